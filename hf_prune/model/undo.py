"""A model put back as it was: after a cut that was stopped in the middle, or after one that was only tried."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .offload import places
from .shelf import Shelf, Shelved

ROOM = 2**30  # bytes of old weights that are kept in memory


@contextlib.contextmanager
def undone_on_error(modules: Sequence[nn.Module], configs: Sequence[Any]) -> Iterator[None]:
    """Put `modules` and `configs` back if what happens inside is not finished."""
    put_back = remembered(modules, configs)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextlib.contextmanager
def undone(modules: Sequence[nn.Module], configs: Sequence[Any]) -> Iterator[None]:
    """Put `modules` and `configs` back at the end."""
    put_back = remembered(modules, configs)
    try:
        yield
    finally:
        put_back()


def remembered(modules: Sequence[nn.Module], configs: Sequence[Any]) -> Callable[[], None]:
    """What puts weights, buffers, submodules and attributes of `modules`, and `configs`, back as they are now.

    Until then weights may be replaced, not written in place (see `cut.put_`). The old ones are kept: of an
    accelerator's in the host's memory, on a CPU as they are, so that they take memory beside the new ones; what is more
    than `ROOM` in a temporary file; of offloaded ones where they lie.
    """
    attributes = [(vars(each), dict(vars(each))) for each in (*modules, *configs)]
    inside = [(dict(module._modules), dict(module._buffers)) for module in modules]
    names = [{name: id(p) for name, p in module._parameters.items()} for module in modules]
    weights, stored = _kept(modules), places(modules)

    def put_back() -> None:
        stored()
        for live, before in attributes:
            live.clear()
            live.update(before)
        for module, (submodules, buffers) in zip(modules, inside, strict=True):
            module._modules, module._buffers = submodules, buffers
        found = {key: give() for key, give in weights.items()}
        for module, keys in zip(modules, names, strict=True):
            module._parameters = {name: found.get(key) for name, key in keys.items()}

    return put_back


def _kept(modules: Sequence[nn.Module]) -> dict[int, Callable[[], nn.Parameter]]:
    """By the id of each weight what gives it back; tied ones are one."""
    kept, found = Shelf(ROOM).list(), dict[int, Callable[[], nn.Parameter]]()
    for parameter in (p for module in modules for p in module._parameters.values() if p is not None):
        if id(parameter) not in found:
            found[id(parameter)] = _held(parameter, kept)
    return found


def _held(parameter: nn.Parameter, kept: Shelved) -> Callable[[], nn.Parameter]:
    device, learns, alive = parameter.device, parameter.requires_grad, weakref.ref(parameter)
    if device.type == "meta":
        return lambda: parameter
    number = len(kept)
    kept.append(parameter if device.type == "cpu" else parameter.detach().cpu())

    def give() -> nn.Parameter:
        same = alive() if device.type == "cpu" else None  # kept in memory, or by something else
        return nn.Parameter(kept[number].to(device), requires_grad=learns) if same is None else same

    return give
