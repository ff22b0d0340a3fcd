"""What a run resumes from: which checkpoints are complete, and whether settings and data are those of before."""

from __future__ import annotations

import itertools
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..checkpoint.history import PLAN_FILE, History
from ..config import PruningConfig
from ..files import read_json
from ..model.batches import even_positions
from .adapters import home_of
from .rounds import STATE_FILE, Run

LOOKED_AT = 8  # examples that the fingerprint of data is made of


# --- the checkpoint to resume from -----------------------------------------------------------------------------------


def checkpoint_for(given: Any, output_dir: Path, config: PruningConfig, data: Mapping[str, Any]) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: True is the latest complete one in `output_dir`, if any.

    Args:
        config: the settings of this run.
        data: its data sets by name.

    Raises:
        ValueError: it is not complete, or of a run with other settings or data. TypeError: neither a path nor True.
    """
    if given is None or given is False:
        return None
    if not isinstance(given, bool | str | os.PathLike):
        raise TypeError(f"resume_from_checkpoint takes a directory or True, got {given!r:.60}.")
    directory = _latest(output_dir) if given is True else Path(str(given))
    if directory is None:
        return None
    wrong = damage(directory)
    if wrong:
        raise ValueError(
            f"{directory} is no complete checkpoint of a run with pruning: {wrong}. Give another, or "
            "resume_from_checkpoint=True for the latest that is complete."
        )
    _check_same(directory, config, data)
    if not list(directory.glob("rng_state*.pth")):
        warnings.warn(
            f"{directory} has no rng_state: dropout is drawn anew, and the run will not end as it would have.",
            stacklevel=4,
        )
    return directory


def _latest(output_dir: Path) -> Path | None:
    """The latest checkpoint that is complete; a warning names the newer ones that are not."""
    wrong = {path: damage(path) for path in checkpoints(output_dir)}
    found = max((path for path in wrong if not wrong[path]), key=step_of, default=None)
    passed = [path for path in wrong if wrong[path] and (found is None or step_of(path) > step_of(found))]
    if passed:
        said = "; ".join(f"{path.name} ({wrong[path]})" for path in passed)
        warnings.warn(f"In {output_dir}, not whole and passed over: {said}.", stacklevel=5)
    if found is None:
        warnings.warn(f"No complete checkpoint in {output_dir}: training starts anew.", stacklevel=5)
    return found


def _check_same(directory: Path, config: PruningConfig, data: Mapping[str, Any]) -> None:
    """Raise ValueError unless a checkpoint's run had the same settings and data as this one."""
    run = Run.load(directory)
    theirs, ours = run.config.to_dict(), config.to_dict()
    changed = {key: (theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]}
    if changed:
        raise ValueError(
            f"{directory} was made with another PruningConfig; (there, here): {changed}. Resume with the same, or "
            "train into another output_dir."
        )
    for name, there in (run.data or {}).items():
        wrong = apart(there, known_by(data.get(name)))
        if wrong:
            raise ValueError(
                f"{directory} was made with another {name}: {wrong}. Resume with the same, or train into another "
                f'output_dir. (If it is the same, take "data" out of the checkpoint\'s {STATE_FILE}.)'
            )


# --- which checkpoints are complete ----------------------------------------------------------------------------------


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a directory in the order of their steps, complete or not."""
    return sorted(filter(is_named_checkpoint, directory.glob("*")), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def is_named_checkpoint(path: Path) -> bool:
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) is not None


def complete_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints that a run can resume from, in the order of their steps."""
    return [path for path in checkpoints(directory) if not damage(path)]


def damage(directory: Path) -> str:
    """What keeps a run from resuming from a checkpoint, in words; "" where nothing does. It reads no weights."""
    try:
        run = Run.load(directory)
        trainer_state(directory)  # the stock trainer writes it last
        home = home_of(directory)
        read_json(home / "config.json")
        if run.plan is not None and History.load(home) is None:
            return f"{PLAN_FILE} is missing"
        return _broken(directory, home)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return str(error).rstrip(".")


def _broken(directory: Path, home: Path) -> str:
    """The same for the files that hold tensors."""
    there = [path for path in directory.iterdir() if path.suffix in (".pt", ".pth")]
    pair = {OPTIMIZER_NAME, SCHEDULER_NAME}
    missing = pair - {path.name for path in there}
    found = [path.name for path in _weights(directory, home) if not _is_whole(path)]
    found += [path.name for path in there if not zipfile.is_zipfile(path)]
    found += missing if missing != pair else ()  # neither: a round begins here, or only the model was saved
    return f"{', '.join(found)} is missing or not whole" if found else ""


def _weights(directory: Path, home: Path) -> Iterator[Path]:
    index = home / SAFE_WEIGHTS_INDEX_NAME
    names = read_json(index).get("weight_map") if index.is_file() else {"": SAFE_WEIGHTS_NAME}
    if not isinstance(names, Mapping):
        raise ValueError(f"{index.name} names no files.")
    yield from (home / name for name in sorted(set(names.values())))
    if home != directory:
        yield directory / ADAPTER_SAFE_WEIGHTS_NAME


def _is_whole(path: Path) -> bool:
    """Whether a file holds as many bytes as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def trainer_state(directory: Path) -> TrainerState:
    """The stock trainer's state.

    Raises:
        FileNotFoundError: nothing is there. ValueError: something else is.
    """
    path = directory / TRAINER_STATE_NAME
    step = read_json(path).get("global_step")
    try:
        if isinstance(step, int) and step >= 0:
            return TrainerState.load_from_json(str(path))
    except TypeError as error:
        raise ValueError(f"{path.name} is damaged ({error}).") from error
    raise ValueError(f"{path.name} names no step.")


# --- whether data are the same ---------------------------------------------------------------------------------------


def known_by(data: Any) -> dict[str, Any] | None:
    """A cheap fingerprint of data, the same in every process: how many rows there are, and a hash of a few of them.

    The rows are read twice: where a random augmentation changes them in between, there is no hash. Data that can be
    read only once are not read.
    """
    if data is None:
        return None
    rows = len(data) if hasattr(data, "__len__") else None
    try:
        first, second = (Hasher.hash(_some(data, rows)) for _ in range(2))
    except Exception:  # of any kind, from the user's code: training will report it
        return {"rows": rows, "hash": None}
    return {"rows": rows, "hash": first if first == second else None}


def _some(data: Any, rows: int | None) -> list[Any]:
    if hasattr(data, "with_format"):
        data = data.with_format(None)  # as stored: a transform may be random
    if rows is not None and hasattr(data, "__getitem__"):
        return [data[i] for i in even_positions(rows, LOOKED_AT, 0)]
    if iter(data) is data:
        raise TypeError("can be read once")
    return list(itertools.islice(iter(data), LOOKED_AT))


def apart(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    """How two data sets differ by their fingerprints, in words; "" where they do not, or where that is unknown."""
    for what in ("rows", "hash"):
        a, b = (there or {}).get(what), (here or {}).get(what)
        if a is not None and b is not None and a != b:
            return f"{a} rows there, {b} here" if what == "rows" else "other rows"
    return ""
