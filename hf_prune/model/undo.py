"""All of a cut or nothing: a model that an error or an interrupt stopped in the middle is put back as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def undone_on_error(modules: Sequence[nn.Module], configs: Sequence[Any]) -> Iterator[None]:
    """Put the weights and attributes of `modules`, and `configs`, back if what happens inside is not finished.

    Inside, weights may be replaced, not written in place (see `surgery.put_`). The old ones are kept till the end: on a
    CPU as they are, so that they take memory beside the new ones; of an accelerator's in the host's memory.
    """
    attributes = [(vars(each), dict(vars(each))) for each in (*modules, *configs)]
    weights = [{name: _kept(p) for name, p in module._parameters.items()} for module in modules]
    devices = [{name: p.device for name, p in module._parameters.items() if p is not None} for module in modules]
    try:
        yield
    except BaseException:
        for live, before in attributes:
            live.clear()
            live.update(before)
        for module, kept, places in zip(modules, weights, devices, strict=True):
            module._parameters = {name: _back(p, places.get(name)) for name, p in kept.items()}
        raise


def _kept(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.device.type == "cpu":
        return parameter
    return nn.Parameter(parameter.detach().cpu(), requires_grad=parameter.requires_grad)


def _back(parameter: nn.Parameter | None, device: torch.device | None) -> nn.Parameter | None:
    if parameter is None or parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
