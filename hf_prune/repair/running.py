"""Running statistics of batch norms, estimated again where what they read has changed.

Mean and variance of the whole calibration data, not of batches: one pass for each norm, in the order in which the model
runs them, so that each sees what those before it now give.

Shapes: B examples, C channels, n positions of all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.batches import Batch, forward_inputs
from ..model.cut import put_
from ..model.layerwise import observed
from ..model.offload import real

Call = Callable[[], Any]


def norms_of(module: nn.Module) -> list[str]:
    """The batch norms with running statistics in a module, by path."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return [name for name, m in module.named_modules() if isinstance(m, kinds) and m.running_mean is not None]


def in_order(module: nn.Module, paths: Sequence[str], call: Call) -> list[str]:
    """The paths in the order in which a call runs them; those that it does not run are left out."""
    return [path for path in observed(module, call, inputs_of=paths) if path in {*paths}]


def estimate_(module: nn.Module, paths: Sequence[str], calls: Sequence[Call], rows: Sequence[torch.Tensor]) -> None:
    """Set the running statistics of these norms, in their order, to what they read in these calls.

    Args:
        rows: which examples of each call count, [B].
    """
    for path in paths:
        sums = Spread()
        for call, chosen in zip(calls, rows, strict=True):
            if chosen.any():
                seen = observed(module, call, inputs_of=[path], stop_at=path)
                if path in seen:
                    sums.add(seen[path][chosen.to(seen[path].device)])
        if sums.positions > 1:
            norm = module.get_submodule(path)
            with real(norm):
                put_(norm, "running_mean", sums.mean)
                put_(norm, "running_var", sums.variance)


class Spread:
    """Mean and unbiased variance of each channel over all positions, in fp64."""

    def __init__(self) -> None:
        self.positions, self.total, self.square = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: torch.Tensor) -> None:
        """x: [B, C, ...]"""
        columns = x.double().transpose(0, 1).flatten(1)
        self.positions += columns.shape[1]
        self.total = self.total + columns.sum(1)
        self.square = self.square + columns.square().sum(1)

    @property
    def mean(self) -> torch.Tensor:
        return self.total / self.positions

    @property
    def variance(self) -> torch.Tensor:
        spread = self.square - self.total * self.mean
        return (spread / (self.positions - 1)).clamp_min(0)


def estimate_behind_(model: Any, layers: Iterable[str], batches: Sequence[Batch]) -> None:
    """Estimate the norms that lie outside these lists of layers, and that the model runs behind the first of them."""
    roots = tuple(f"{path}." for path in layers)
    outside = [path for path in norms_of(model) if not path.startswith(roots)]
    if not outside:
        return
    calls = [partial(model, **forward_inputs(model, batch)) for batch in batches]
    first = f"{roots[0]}0"
    order = in_order(model, [first, *outside], calls[0])
    behind = order[order.index(first) + 1 :]
    estimate_(model, behind, calls, [batch.held_out == 0 for batch in batches])


def calls_of(layer: nn.Module, states: Sequence[torch.Tensor], arguments: Sequence[Mapping[str, Any]]) -> list[Call]:
    """The calls of a layer on a stream, one a batch."""
    return [partial(layer, state, **each) for state, each in zip(states, arguments, strict=True)]
