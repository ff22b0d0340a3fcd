"""A model put back as it was: after a cut that was stopped in the middle, or after one that was only tried."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .offload import places


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

    Until then weights may be replaced, not written in place (see `cut.put_`). The old ones are kept: on a CPU as they
    are, so that they take memory beside the new ones; of an accelerator's in the host's memory; of offloaded ones where
    they lie.
    """
    attributes = [(vars(each), dict(vars(each))) for each in (*modules, *configs)]
    inside = [(dict(module._modules), dict(module._buffers)) for module in modules]
    weights = [{name: _kept(p) for name, p in module._parameters.items()} for module in modules]
    stored = places(modules)
    devices = [{name: p.device for name, p in module._parameters.items() if p is not None} for module in modules]

    def put_back() -> None:
        stored()
        for live, before in attributes:
            live.clear()
            live.update(before)
        for module, (submodules, buffers) in zip(modules, inside, strict=True):
            module._modules, module._buffers = submodules, buffers
        for module, kept, were in zip(modules, weights, devices, strict=True):
            module._parameters = {name: _back(p, were.get(name)) for name, p in kept.items()}

    return put_back


def _kept(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.device.type in ("cpu", "meta"):
        return parameter
    return nn.Parameter(parameter.detach().cpu(), requires_grad=parameter.requires_grad)


def _back(parameter: nn.Parameter | None, device: torch.device | None) -> nn.Parameter | None:
    if parameter is None or parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
