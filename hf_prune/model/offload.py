"""Weights that accelerate holds back, in memory or on disk, and loads for each forward pass: read, replaced, put back.

All loading is accelerate's own. Between two passes the weights of an offloaded module are on the meta device, and its
`AlignDevicesHook` reads them from the hook's `weights_map`. A forward pass needs nothing from here. Whoever reads or
replaces weights does it inside `real`: they are loaded by the same hook, and what was put in their place goes back to
where they came from: tensors in memory, files in the offload folder. Files are only added, so that a cut can be undone.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import (
    OffloadedWeightsLoader,
    PrefixedDataset,
    align_module_device,
    has_offloaded_params,
    named_module_tensors,
)
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .patched import computing

OF_HOOKS = ("_hf_hook", "_old_forward", "forward")  # what accelerate puts into the dict of a module


# --- weights made real -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def real(*modules: nn.Module) -> Iterator[None]:
    """The modules' own weights, there to be read and replaced: forward passes neither load nor drop them meanwhile.

    Nothing happens to modules that are not offloaded, nor to those that are real already.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            if has_offloaded_params(module):
                stack.enter_context(_held(module))
        yield


@contextlib.contextmanager
def _held(module: Any) -> Iterator[None]:
    hook = module._hf_hook
    with align_module_device(module):
        loaded = {name: getattr(module, name) for name in _names(module)}
        hook.offload = False  # else a pass in here would load the old weights over the new ones, then drop both
        try:
            yield
            for name, tensor in loaded.items():
                if getattr(module, name) is not tensor:
                    _store_(module, name)
        except BaseException:
            for name, tensor in loaded.items():  # whose shapes are those of what is stored
                setattr(module, name, tensor)
            raise
        finally:
            hook.offload = True


def _names(module: Any) -> list[str]:
    """The tensors that the hook of an offloaded module loads."""
    of_buffers = module._hf_hook.offload_buffers
    return [name for name, _ in named_module_tensors(module, include_buffers=of_buffers, remove_non_persistent=True)]


def let_go(model: nn.Module) -> None:
    """Drop the weights of modules whose pass was stopped in the middle, before their hook could."""
    for module in model.modules():
        if has_offloaded_params(module) and not all(getattr(module, name).is_meta for name in _names(module)):
            hook: Any = module._hf_hook
            vars(hook).setdefault("tied_pointers_to_remove", set())
            hook.post_forward(module, None)


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: of offloaded weights, the device that they are loaded to."""
    owner, first = next((each, p) for each in module.modules() for p in each.parameters(recurse=False))
    return torch.device(owner._hf_hook.execution_device) if has_offloaded_params(owner) else first.device  # type: ignore[union-attr, arg-type]


# --- the places where they lie ---------------------------------------------------------------------------------------


class Written(dict[str, Any]):
    """What accelerate's index says of a weight in a file of ours, which is removed once nothing names it any more."""

    def __init__(self, file: str, key: str) -> None:
        super().__init__(safetensors_file=file, weight_name=key)
        weakref.finalize(self, _remove, file, os.getpid())

    def __deepcopy__(self, memo: Any) -> Written:
        return self  # the index of a copied model names the same file


def _remove(file: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked process, which has a copy of the index
        Path(file).unlink(missing_ok=True)


def _place(module: Any, name: str) -> tuple[dict[str, Any], str, Any]:
    """Where a weight lies: a mapping and its key there; with the offload folder where that is an index of files.

    Raises:
        ValueError: another kind of mapping than accelerate makes.
    """
    stored, key = module._hf_hook.weights_map, name
    while isinstance(stored, PrefixedDataset):
        stored, key = stored.dataset, f"{stored.prefix}{key}"
    if isinstance(stored, OffloadedWeightsLoader):
        return (stored.state_dict, key, None) if key in stored.state_dict else (stored.index, key, stored.save_folder)
    if isinstance(stored, dict):
        return stored, key, None
    raise ValueError(
        f"{key} is offloaded into a {type(stored).__name__}, which cannot be written to. Offload with "
        "from_pretrained(device_map=...), or accelerate's dispatch_model, cpu_offload or disk_offload."
    )


def _store_(module: Any, name: str) -> None:
    """Put a module's weight as it is now where the hook will read it."""
    entries, key, folder = _place(module, name)
    value, before = getattr(module, name).detach(), entries[key]
    entries[key] = value.to(before.device) if isinstance(before, torch.Tensor) else _written(value, key, folder)


def _written(value: torch.Tensor, key: str, folder: str | os.PathLike[str]) -> Written:
    """A weight in a new file of the offload folder, beside the one that it replaces.

    Raises:
        OSError: it cannot be written.
    """
    file = ""
    try:
        handle, file = tempfile.mkstemp(".safetensors", f"hf_prune-{key[-100:]}-", folder)
        os.close(handle)
        save_file({key: value.cpu().contiguous()}, file)
    except (OSError, SafetensorError) as error:
        if file:
            Path(file).unlink(missing_ok=True)
        raise OSError(
            f"{key} cannot be written to the offload folder {os.fspath(folder)!r} ({error}). Make room there, or load "
            "the model with another offload_folder. The model is as it was."
        ) from error
    return Written(file, key)


def bytes_in_memory(model: nn.Module) -> int:
    """What a model's weights take in memory between passes, those that accelerate holds back there with them."""
    stored = (entries.get(key) for _, (entries, key, _), _ in _stored(model))
    kept = [*model.parameters(), *(entry for entry in stored if isinstance(entry, torch.Tensor))]
    return sum({id(each): each.numel() * each.element_size() for each in kept if not each.is_meta}.values())


def places(modules: Sequence[nn.Module]) -> Callable[[], None]:
    """What puts the stored weights of modules back as they are now; files that were written since then are removed."""
    found = [_place(m, name)[:2] for m in modules if has_offloaded_params(m) for name in _names(m)]
    before = [(entries, key, entries[key]) for entries, key in found if key in entries]

    def put_back() -> None:
        for entries, key, value in before:
            entries[key] = value

    return put_back


def forget_(modules: Sequence[nn.Module]) -> None:
    """Free what is stored for modules that have left the model."""
    for module in (module for module in modules if has_offloaded_params(module)):
        for name in _names(module):
            entries, key, _ = _place(module, name)
            entries.pop(key, None)


# --- tied weights, copies, forward -----------------------------------------------------------------------------------


def tie_again_(model: nn.Module) -> None:
    """Let the placeholders of tied weights be one again: accelerate's hooks part them at every pass.

    Real weights stay, and so do those of models that are not offloaded.
    """
    groups: dict[str, list[str]] = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, [source]).append(target)
    for names in groups.values():
        owners = [(model.get_submodule(path), end) for path, _, end in (name.rpartition(".") for name in names)]
        here = [(owner, end) for owner, end in owners if owner._parameters.get(end) is not None]
        if any(has_offloaded_params(owner) for owner, _ in here) and _are_one(here):
            weights = [owner._parameters[end] for owner, end in here]
            one = next((weight for weight in weights if not weight.is_meta), weights[0])  # type: ignore[union-attr]
            for owner, end in here:
                owner._parameters[end] = one


def _are_one(places: Sequence[tuple[nn.Module, str]]) -> bool:
    """Whether weights that a class ties are tied here: what lies in memory tells."""
    stored = [_place(*place) for place in places if has_offloaded_params(place[0])]
    found = [entries.get(key) for entries, key, _ in stored]
    pointers = {value.data_ptr() for value in found if isinstance(value, torch.Tensor)}
    return len(pointers) < 2 and len({getattr(owner, name).shape for owner, name in places}) == 1


def share_(module: nn.Module, name: str, source: nn.Module, its_name: str) -> None:
    """Let a module have the weight of another one."""
    with real(source, module):
        setattr(module, name, getattr(source, its_name))


def bare(module: nn.Module) -> nn.Module:
    """A copy of a module whose weights are real, without accelerate's hooks (which hold on to all weights)."""
    hooks = {name: vars(module).pop(name) for name in OF_HOOKS if name in vars(module)}
    try:
        return copy.deepcopy(module)
    finally:
        vars(module).update(hooks)


@contextlib.contextmanager
def unhooked(model: nn.Module) -> Iterator[None]:
    """The model with the `forward` of its classes: nothing is loaded or moved."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if "_old_forward" in vars(module):
                stack.enter_context(computing(module, module._old_forward))  # type: ignore[arg-type]
        yield


def streamed_to(device: torch.device, model: Any) -> Any:
    """A model whose weights are all on disk, loaded to this device for each pass."""
    loader = next(module._hf_hook.weights_map.dataset for module in model.modules() if has_offloaded_params(module))
    remove_hook_from_submodules(model)
    places = {"offload_dir": loader.save_folder, "offload_index": loader.index}
    return dispatch_model(model, {"": "disk"}, main_device=str(device), **places)


@contextlib.contextmanager
def saveable(model: Any) -> Iterator[None]:
    """An offloaded model that `model.save_pretrained` writes shard by shard, as it does where there is a device map."""
    tie_again_(model)  # it looks for weights that are one
    mapped = hasattr(model, "hf_device_map")
    if not mapped:
        model.hf_device_map = {"": "disk"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
            yield
    finally:
        if not mapped:
            del model.hf_device_map


# --- what cannot be ---------------------------------------------------------------------------------------------------


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weights of a model are offloaded."""
    return any(has_offloaded_params(m) and any(True for _ in m.parameters(recurse=False)) for m in model.modules())


def check_in_memory(model: nn.Module, what: str) -> None:
    """Raise ValueError for offloaded weights, which something cannot work on."""
    if is_offloaded(model):
        raise ValueError(
            f"{what}, and weights of this {type(model).__name__} are offloaded (accelerate loads them for each pass). "
            "Load the model without offloading: no device_map, or one that leaves nothing to 'cpu' (beside a GPU) or "
            "'disk'."
        )


def check_readable(model: nn.Module) -> None:
    """Raise for offloaded weights that cannot be loaded.

    Raises:
        ValueError: in an unknown kind of place. FileNotFoundError: in a file that is not there.
    """
    for name, (entries, key, folder), _ in _stored(model):
        entry = entries.get(key)
        if isinstance(entry, torch.Tensor):
            continue
        file = (entry or {}).get("safetensors_file") or os.path.join(folder or "", f"{key}.dat")
        if entry is None or not os.path.isfile(file):
            raise FileNotFoundError(
                f"{name} is offloaded to {file!r}, which is not there (any more). Load the model again, with an "
                "offload_folder that stays until the model is saved."
            )


def not_on_disk(model: nn.Module) -> list[str]:
    """Offloaded weights that no file holds: what a class made anew on loading, since its checkpoint has none."""
    return [name for name, (entries, key, _), _ in _stored(model) if not isinstance(entries.get(key), dict)]


def check_writable(model: nn.Module, share: float) -> None:
    """Raise for weights on disk whose successors cannot be stored.

    Args:
        share: of these weights, how much a cut leaves at most.

    Raises:
        ValueError: no offload folder. OSError: nothing may be written there, or there is too little room.
    """
    needed: dict[str, int] = {}
    for name, (entries, key, folder), tensor in _stored(model):
        if not isinstance(entries.get(key), torch.Tensor):
            home = _folder(name, folder)
            needed[home] = needed.get(home, 0) + tensor.numel() * tensor.element_size()
    for home, size in needed.items():
        free = shutil.disk_usage(home).free
        if free < share * size:
            raise OSError(
                f"The offload folder {home!r} has {free / 1e9:.3g} GB left; the weights of the smaller model take up "
                f"to {share * size / 1e9:.3g} GB there. Make room, or load the model with another offload_folder."
            )


def _stored(model: nn.Module) -> Iterator[tuple[str, tuple[dict[str, Any], str, Any], torch.Tensor]]:
    """The name of every offloaded weight, where it lies, and its placeholder."""
    for path, module in model.named_modules():
        for name in _names(module) if has_offloaded_params(module) else ():
            yield f"{path}.{name}", _place(module, name), getattr(module, name)


def _folder(name: str, folder: str | os.PathLike[str] | None) -> str:
    if folder is None:
        raise ValueError(
            f"{name} is offloaded to disk and read from the checkpoint itself, which is not written to: say where "
            "the weights of the smaller model go, from_pretrained(..., offload_folder='some/directory')."
        )
    home = os.fspath(folder)
    if not os.path.isdir(home):
        raise FileNotFoundError(
            f"The offload folder {home!r} of {name} is not there (any more). Load the model again, with an "
            "offload_folder that stays until the model is saved."
        )
    if not os.access(home, os.W_OK):
        raise PermissionError(
            f"Nothing may be written to the offload folder {home!r}, where the weights of the smaller model go. Load "
            "the model with another offload_folder."
        )
    return home
