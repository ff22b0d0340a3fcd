"""The proof that a checkpoint reloads: it is opened as users will, compared, and its files are fingerprinted."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..files import read_json, write_text
from ..model.offload import device_of, is_offloaded, streamed_to
from ..model.probe import random_inputs
from ..model.weights import quiet
from .convert import auto_classes
from .directory import path_of, put_back
from .history import PLAN_FILE, PROOF_ROWS, REPORT_FILE, history_of
from .remote_code import CODE_FILE

PROOF_FILE = "verified.json"  # what was proven to reload: the difference, and sha256 of all files of the save
BASE = "base_model"  # beside adapters: the pruned weights that they belong to
UNPROVEN = (PROOF_FILE, "README.md", "training_args.bin")  # not fingerprinted: itself, the card, and a pickle
LOADED = (  # names that from_pretrained looks for, so that they change what a checkpoint computes
    "model.safetensors", "model-*.safetensors", "pytorch_model*.bin", "*.index.json", "config.json",
    "generation_config.json", "adapter_model*", "adapter_config.json", CODE_FILE, BASE, PLAN_FILE, REPORT_FILE,
)  # fmt: skip
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def is_loaded(name: str) -> bool:
    """Whether a file of this name is part of a checkpoint, whoever wrote it."""
    return name == PROOF_FILE or any(fnmatch(name, pattern) for pattern in LOADED)


# --- comparing -------------------------------------------------------------------------------------------------------


def proof_inputs(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> dict[str, Any]:
    """A few rows to compare two forms of a model on: of `batches`, else those kept by prune(), else random ones."""
    if batches is not None:
        known, first = inspect.signature(model.forward).parameters, _first(batches)
        return {k: v[:PROOF_ROWS].to(device_of(model)) for k, v in first.items() if k in known}
    history = history_of(model)
    if history is not None and history.batch is not None:
        return {k: v.to(device_of(model)) for k, v in history.batch.inputs.items()}
    return random_inputs(model, PROOF_ROWS, 16)


def _first(batches: Any) -> Mapping[str, torch.Tensor]:
    """The first of some batches.

    Raises:
        ValueError: none, or another form.
    """
    try:
        first = None if isinstance(batches, Mapping | str) else next(iter(batches), None)
    except TypeError:
        first = None
    if not isinstance(first, Mapping) or not first or not all(_has_rows(value) for value in first.values()):
        raise ValueError(
            "batches is a list of dicts of tensors for model(**batch), to compare the outputs on; got "
            f"{type(batches).__name__}{'' if first is None else f' of {type(first).__name__}'}. Without it the save "
            "chooses some itself."
        )
    return first


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) > 0


def _expected(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """What the model in memory gives.

    Raises:
        ValueError: it does not run.
    """
    try:
        return _outputs(model, inputs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on {', '.join(inputs) or 'nothing'}, to compare its outputs on "
            f"({error!r}). Give batches=[...] that it runs on. Nothing was saved."
        ) from error


def _apart(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value; NaN where there is one, infinite for other shapes."""
    if [value.shape for value in expected] != [value.shape for value in found]:
        return float("inf")
    pairs = zip(expected, found, strict=True)
    each = [(a - b).abs().max() / a.abs().max().clamp_min(1.0) for a, b in pairs if a.numel()]
    return float(torch.stack(each).max()) if each else float("nan")


def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """Outputs in the precision of the weights, also where a Trainer has wrapped `forward` to compute in another."""
    wrapped = model.__dict__.pop("forward", None) if hasattr(model, "_original_forward") else None  # by accelerate
    try:
        with quiet(model), torch.no_grad():
            output = model(**inputs)
    finally:
        if wrapped is not None:
            model.forward = wrapped
    return [value.float().cpu() for value in output.to_tuple() if isinstance(value, torch.Tensor)]


def prove(
    model: PreTrainedModel,
    directory: Path,
    cls: type[PreTrainedModel] | None = None,
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    remote_code: bool = False,
) -> float:
    """Open a directory as users will, compare its outputs with those of the model in memory, and write PROOF_FILE.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        ValueError: a model that does not run on the batches. RuntimeError: a difference beyond the dtype's rounding.
    """
    cls, inputs = cls or type(model), proof_inputs(model, batches)
    expected = _expected(model, inputs)
    opener: Any = cls
    options: dict[str, Any] = {"dtype": model.dtype}
    if remote_code:
        import transformers

        opener = getattr(transformers, auto_classes(cls)[0])
        options["trust_remote_code"] = True
    with _reloaded(model, opener, directory, options) as reloaded:
        reloaded.set_attn_implementation(model.config._attn_implementation)
        worst = _apart(expected, _outputs(reloaded, inputs))
    if not worst <= TOLERANCE.get(model.dtype, 1e-4):
        raise RuntimeError(
            f"The saved {cls.__name__} does not reproduce the model in memory: outputs differ by {worst:.2e} of their "
            f"largest value (allowed {TOLERANCE.get(model.dtype, 1e-4):.0e}). Nothing was saved."
        )
    proof = {"difference": worst, "transformers": version("transformers"), "files": fingerprints(directory)}
    write_text(directory / PROOF_FILE, json.dumps(proof, indent=1) + "\n")
    return worst


@contextlib.contextmanager
def _reloaded(model: PreTrainedModel, opener: Any, directory: Path, options: Mapping[str, Any]) -> Iterator[Any]:
    """A directory opened where the model in memory computes; of one that is offloaded, weights stay in the files."""
    if not is_offloaded(model):
        yield _opened(opener, directory, options).to(model.device)
        return
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:  # for weights that a class holds in another form
        on_disk = {"device_map": {"": "disk"}, "offload_folder": scratch}
        yield streamed_to(device_of(model), _opened(opener, directory, {**options, **on_disk}))


def _opened(opener: Any, directory: Path, options: Mapping[str, Any]) -> Any:
    try:
        return opener.from_pretrained(directory, **options)
    except Exception as error:
        raise RuntimeError(f"What was written does not open ({error!r}). Nothing was saved.") from error


# --- files -----------------------------------------------------------------------------------------------------------


def fingerprints(directory: Path) -> dict[str, str]:
    """sha256 of every file that a save has written, by relative path."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in UNPROVEN)
    return {path.relative_to(directory).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def proven(directory: str | os.PathLike[str]) -> dict[str, str]:
    """sha256 of the files that a save proved, by relative path.

    Raises:
        ValueError: nothing was proven here.
    """
    return _proof(Path(directory))["files"]


def _proof(home: Path) -> dict[str, Any]:
    path = home / PROOF_FILE
    if not path.is_file():
        raise ValueError(f"{home} was never proven to reload: save the model with hf_prune.save_pretrained.")
    proof = read_json(path)
    files, difference = proof.get("files"), proof.get("difference")
    if not isinstance(files, dict) or not files or not isinstance(difference, float | int):
        raise ValueError(
            f"{path} names no files, or no difference. Save the model again with hf_prune.save_pretrained."
        )
    return proof


def checkpoint(directory: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint, put back first if a killed writer had moved it away.

    Raises:
        FileNotFoundError: there is none. NotADirectoryError: it is a file. ValueError, TypeError: not a path.
    """
    home = path_of(directory)
    put_back(home)
    if not home.exists():
        raise FileNotFoundError(f"{home}: no such directory. Give one that hf_prune saved.")
    if not home.is_dir():
        raise NotADirectoryError(f"{home} is a file. Give a directory that hf_prune saved.")
    return home


def verify(directory: str | os.PathLike[str]) -> float:
    """Check that a saved checkpoint still is what was proven to reload. Every file is read once; no model is opened.

    A directory that a killed writer had moved away is put back first.

    Returns:
        The difference that the save found between the outputs of the reloaded model and of the one in memory, relative
        to the largest.

    Raises:
        ValueError: it was never proven, or files were changed, lost or added since; the message names them.
        FileNotFoundError, NotADirectoryError: no such directory. TypeError: not a path.
    """
    home = checkpoint(directory)
    proof = _proof(home)
    files = proof["files"]
    changed = [name for name, digest in files.items() if not (home / name).is_file() or _sha256(home / name) != digest]
    changed += [path.name for path in home.iterdir() if is_loaded(path.name) and not _is_known(path.name, files)]
    if changed:
        raise ValueError(
            f"{directory} is not what was proven to reload: {', '.join(sorted(changed))} changed since. Save the model "
            "again with hf_prune.save_pretrained."
        )
    return float(proof["difference"])


def _is_known(name: str, files: Mapping[str, str]) -> bool:
    return name == PROOF_FILE or any(path.split("/")[0] == name for path in files)


def weights_id(directory: str | os.PathLike[str]) -> str:
    """A name for the weights that a save proved, made of the sha256 of their files; "" where nothing was proven."""
    files = proven(directory) if Path(directory, PROOF_FILE).is_file() else {}
    parts = [f"{name} {digest}" for name, digest in sorted(files.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""
