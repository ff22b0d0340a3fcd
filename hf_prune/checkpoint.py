"""Checkpoints that are proven to reload: the loader, and a verified, atomic save."""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import families, layout, sites, surgery
from .anatomy import probe_inputs, quiet
from .families import family_for
from .layout import KEY, build_, needs_loader, write_
from .oneshot import PROOF_ROWS, record_of

CODE_FILE = "modeling_hf_prune.py"
PROOF_FILE = "verified.json"  # what was proven to reload: the difference, and sha256 of the files
PROVEN = ("*.safetensors", "config.json", "*.py")  # what decides what a checkpoint computes
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}


# --- loader ----------------------------------------------------------------------------------------------------------


def install_loader() -> None:
    """Teach transformers to build the shapes that a pruned config means; runs at `import hf_prune`.

    `PreTrainedModel.__new__` is the one door that every construction passes. A class that meets a pruned config there
    has its `__init__` wrapped, once; all others are left alone. The config shows dense sizes and no `per_layer_config`
    while the stock class builds, so this stays right when transformers ships its own modelling half.
    """
    if "__new__" not in PreTrainedModel.__dict__:
        PreTrainedModel.__new__ = staticmethod(_new)  # type: ignore[method-assign, assignment]


def _new(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
    config = args[0] if args else kwargs.get("config")
    if hasattr(config, "__dict__") and needs_loader(config) and "_hf_prune_loader" not in cls.__dict__:
        _wrap_init(cls)
    return object.__new__(cls)


def _wrap_init(cls: Any) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        build_(self, functools.partial(init, self), config, *args, **kwargs)

    cls.__init__ = __init__
    cls._hf_prune_loader = True


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *,
    processing_class: Any = None,
    overwrite: bool = False,
    remote_code: bool = False,
    model_type: str | None = None,
    **kwargs: Any,
) -> float:
    """`model.save_pretrained` with proof: written beside the target, reloaded, compared, and only then renamed.

    Args:
        batches: inputs to compare the reloaded model on; default: rows kept by prune(), else random tokens.
        processing_class: tokenizer or processor, saved alongside.
        overwrite: replace a directory that is not empty.
        remote_code: add one generated file, so that the checkpoint opens with trust_remote_code without hf_prune.
        model_type: save the same weights as this stock family ("mistral" for a Llama with any head count).
        kwargs: for `model.save_pretrained`.

    Returns:
        The largest absolute difference between the outputs of the reloaded model and of the one in memory.

    Raises:
        FileExistsError: the directory is not empty. ValueError: the model cannot be saved so.
        RuntimeError: the reloaded model gives other outputs; nothing is left under the final name.
    """
    target = Path(directory)
    refuse_full(target, overwrite)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"save_pretrained takes a transformers PreTrainedModel, got {type(model).__name__}.")
    saved = model if model_type is None else as_model_type(model, model_type)
    with beside(target) as temporary:
        saved.save_pretrained(temporary, **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        record = record_of(model)
        if record is not None:
            record.save(temporary)
        if remote_code:
            _add_code(saved, temporary)
        difference = prove(model, temporary, type(saved), batches, remote_code)
    return difference


def refuse_full(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError for a directory that is not empty, unless it may be replaced."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())) and not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty. Choose another, or overwrite it (overwrite=True, --overwrite)."
        )


@contextlib.contextmanager
def beside(target: Path, keep_others: bool = False) -> Iterator[Path]:
    """A directory beside `target` to write into: it takes the target's place at the end, or vanishes on an error.

    Args:
        keep_others: put the new files into a target that holds other things too, each by one atomic replacement.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if keep_others and target.exists():
            _move_into(temporary, target)
        else:
            swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_into(temporary: Path, target: Path) -> None:
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            final = target / path.relative_to(temporary)
            final.parent.mkdir(parents=True, exist_ok=True)
            path.replace(final)


def swap(temporary: Path, target: Path) -> None:
    """Put a finished directory under its final name; what stood there is restored if that fails."""
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f"{temporary.name}.old")
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def proof_inputs(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]] | None) -> dict[str, Any]:
    """A few rows to compare two forms of a model on: of `batches`, else those kept by prune(), else random ones."""
    if batches:
        known = inspect.signature(model.forward).parameters
        return {k: v[:PROOF_ROWS].to(model.device) for k, v in batches[0].items() if k in known}
    record = record_of(model)
    if record is not None and record.batch is not None:
        return {k: v.to(model.device) for k, v in record.batch.inputs.items()}
    inputs = probe_inputs(model, 16, batch=2)
    generator = torch.Generator().manual_seed(0)
    for key, value in inputs.items():
        if value.is_floating_point():
            inputs[key] = torch.randn(value.shape, generator=generator).to(value)
        elif key.endswith("input_ids"):
            value[:, :-1] = torch.randint(model.config.vocab_size, value[:, :-1].shape, generator=generator).to(value)
    return inputs


def _outputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """In the precision of the weights, also where a Trainer has wrapped `forward` into another."""
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
    """Open a directory as users will and compare the outputs with those of the model in memory; say so in a file.

    Returns:
        The largest difference, relative to the largest value.

    Raises:
        RuntimeError: a difference beyond the dtype's rounding.
    """
    cls, inputs = cls or type(model), proof_inputs(model, batches)
    opener: Any = cls
    options: dict[str, Any] = {"dtype": model.dtype}
    if remote_code:
        import transformers

        opener = getattr(transformers, auto_classes(cls)[0])
        options["trust_remote_code"] = True
    reloaded = opener.from_pretrained(directory, **options).to(model.device)
    reloaded.set_attn_implementation(model.config._attn_implementation)
    pairs = zip(_outputs(model, inputs), _outputs(reloaded, inputs), strict=True)
    differences = [((a - b).abs().max() / a.abs().max().clamp_min(1.0)).item() for a, b in pairs]
    worst = max(differences, default=float("nan"))
    if not worst <= TOLERANCE.get(model.dtype, 1e-4):
        raise RuntimeError(
            f"The saved {cls.__name__} does not reproduce the model in memory: outputs differ by {worst:.2e} of their "
            f"largest value (allowed {TOLERANCE.get(model.dtype, 1e-4):.0e}). Nothing was saved."
        )
    proof = {"difference": worst, "transformers": version("transformers"), "files": fingerprints(directory)}
    (directory / PROOF_FILE).write_text(json.dumps(proof, indent=1) + "\n")
    return worst


def fingerprints(directory: Path) -> dict[str, str]:
    """sha256 by name of the files that decide what a checkpoint computes."""
    found = {}
    for path in sorted({path for pattern in PROVEN for path in directory.glob(pattern)}):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**24):
                digest.update(block)
        found[path.name] = digest.hexdigest()
    return found


def weights_id(directory: str | os.PathLike[str]) -> str:
    """Names the weights that a save proved, by the sha256 of their files; "" where nothing was proven."""
    proof = Path(directory) / PROOF_FILE
    files = json.loads(proof.read_text())["files"] if proof.is_file() else {}
    parts = [f"{name} {digest}" for name, digest in sorted(files.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""


# --- another stock family --------------------------------------------------------------------------------------------


def as_model_type(model: PreTrainedModel, model_type: str) -> PreTrainedModel:
    """The same weights (shared, not copied) in the class of another stock family.

    Raises:
        ValueError: this family has no such door, layers differ in size, or the model has biases the other lacks.
    """
    from transformers import AutoConfig

    family = family_for(model.config.model_type)
    if model_type == model.config.model_type:
        return model
    if family.as_model_type != model_type:
        raise ValueError(
            f"A {family.model_type} model cannot be saved as {model_type!r}; allowed: {family.as_model_type!r}."
        )
    values = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    values.pop("per_layer_config", None)
    for site in sites.find_sites(model, family):
        for key, value in layout.site_values(site).items():
            if values.setdefault(f"_{key}", value) != value:
                raise ValueError(f"model_type={model_type!r} needs the same sizes in every layer; {key} differs.")
            values[key] = value
    config = AutoConfig.for_model(model_type)
    known = set(config.to_dict()) - {"transformers_version"}
    config = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if key in known})
    config.sliding_window = None
    cls = _class_of(model_type, type(model))
    with torch.device("meta"):
        twin = cls(config)
    missing = twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing.unexpected_keys or missing.missing_keys:
        raise ValueError(f"{cls.__name__} cannot hold {missing.unexpected_keys or missing.missing_keys} of this model.")
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(twin.get_submodule(owner), attribute, buffer)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    summary = {k: v for k, v in model.config.__dict__.get(KEY, {}).items() if k not in ("format", "shapes", "layers")}
    write_(twin, summary)
    return twin


def auto_classes(cls: type[PreTrainedModel], model_type: str | None = None) -> list[str]:
    """Names of the Auto classes that open a model class, the most specific first."""
    from transformers.models.auto import modeling_auto

    model_type = model_type or cls.config_class.model_type  # type: ignore[union-attr]
    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        names = mapping._model_mapping.get(model_type, ()) if name.startswith("AutoModel") and mapping else ()
        if cls.__name__ in (names if isinstance(names, tuple) else (names,)):
            found.append(name)
    specific = [name for name in found if "For" in name and "PreTraining" not in name]
    return specific or found or ["AutoModel"]


def _class_of(model_type: str, like: type[PreTrainedModel]) -> Any:
    """The class of another family for the same task."""
    import transformers
    from transformers.models.auto import modeling_auto

    auto = getattr(modeling_auto, auto_classes(like)[0])
    name = auto._model_mapping._model_mapping[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


# --- remote code -----------------------------------------------------------------------------------------------------


def code_for(cls: type[nn.Module]) -> str:
    """One self-contained file: the loader's own source, and a subclass of `cls` that builds with it."""
    parts = [_without_relative_imports(module) for module in (families, sites, surgery, layout)]
    subclass = f'''
class Pruned{cls.__name__}(transformers.{cls.__name__}):
    """{cls.__name__} in the sizes that its config gives."""

    def __init__(self, config, *args, **kwargs):
        build_(self, super().__init__, config, *args, **kwargs)
'''
    header = '"""Generated by hf_prune: builds a pruned checkpoint to the sizes in its config."""\n\n'
    header += "from __future__ import annotations\n\nimport transformers\n"
    return header + "\n\n".join(parts) + "\n" + subclass


def _without_relative_imports(module: Any) -> str:
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    return "\n".join(lines).strip()


def _add_code(model: PreTrainedModel, directory: Path) -> None:
    cls = type(model)
    (directory / CODE_FILE).write_text(code_for(cls))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {name: f"{Path(CODE_FILE).stem}.Pruned{cls.__name__}" for name in auto_classes(cls)}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
