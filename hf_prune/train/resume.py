"""What a run resumes from: which checkpoints are whole, and whether data are those of before."""

from __future__ import annotations

import itertools
import re
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

from ..model.batches import even_positions
from ..checkpoint.history import PLAN_FILE, Record
from ..checkpoint.proof import BASE
from ..files import read_json
from .rounds import Run

LOOKED_AT = 8  # examples by which data are known again


# --- checkpoints that a run can go on from ---------------------------------------------------------------------------


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a directory by step, whole or not."""
    return sorted(filter(is_named_checkpoint, directory.glob("*")), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def is_named_checkpoint(path: Path) -> bool:
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) is not None


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that a run can go on from, by step."""
    return [path for path in checkpoints(directory) if not damage(path)]


def damage(directory: Path) -> str:
    """What keeps a run from going on from a checkpoint, in words; "" where nothing does. No weights are read."""
    try:
        run = Run.load(directory)
        trainer_state(directory)  # which the stock trainer writes last
        home = directory / BASE if (directory / BASE).is_dir() else directory
        read_json(home / "config.json")
        if run.plan is not None and Record.load(home) is None:
            return f"{PLAN_FILE} is missing"
        return _broken(directory, home)
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError) as error:
        return str(error).rstrip(".")


def _broken(directory: Path, home: Path) -> str:
    """The same, of the files that hold tensors."""
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
    """Whether the header says as many bytes as there are."""
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


# --- data that are known again ---------------------------------------------------------------------------------------


def known_by(data: Any) -> dict[str, Any] | None:
    """What data are known by in another process, cheaply: how many rows, and a hash of a few.

    The rows are looked at twice: those of a random augmentation have no hash. What can be read only once is not read.
    """
    if data is None:
        return None
    rows = len(data) if hasattr(data, "__len__") else None
    try:
        first, second = (Hasher.hash(_some(data, rows)) for _ in range(2))
    except Exception:  # of any kind, from the user's code; training will say it
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
    """How two sets of data differ, in words; "" where they do not, or where it is not known."""
    for what in ("rows", "hash"):
        a, b = (there or {}).get(what), (here or {}).get(what)
        if a is not None and b is not None and a != b:
            return f"{a} rows there, {b} here" if what == "rows" else "other rows"
    return ""
