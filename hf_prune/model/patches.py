"""How a consumer reads its input, by its type: a linear module the last dimension, a convolution the channels under its
kernel.

Shapes: B examples, P positions of the output, C channels, D outputs, K columns of the weight as a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

POSITIONS = 16384  # of a batch that are looked at; where there are more, those at even distances


def is_convolution(module: Any) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d)


def area(module: Any) -> int:
    """Columns that a channel has: the entries of the kernel; of a linear module one."""
    return int(torch.Size(module.kernel_size).numel()) if is_convolution(module) else 1


def times_gate(module: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The input with each unit multiplied by its gate, in fp32. x: [B, T, K], [B*T, K] or [B, C, ...]; gate: [B, U],
    or [1, U] for all examples."""
    examples, units = gate.shape
    gate = gate.to(x.device)
    if is_convolution(module):
        split = x.float().unflatten(1, (units, -1))
        return (split * gate.view(examples, units, *[1] * (split.dim() - 2))).flatten(1, 2)
    split = x.float().reshape(examples, -1, units, x.shape[-1] // units)
    return (split * gate[:, None, :, None]).reshape(x.shape)


def read_rows(module: Any, x: torch.Tensor) -> torch.Tensor:
    """What the weight as a matrix [D, K] is applied to: [B, P, K], or x as it is for a linear module over tokens."""
    if is_convolution(module):
        return _unfold(module, x)
    return _evenly(x.flatten(1, 2)) if x.dim() == 4 else x


def made_rows(module: Any, y: torch.Tensor) -> torch.Tensor:
    """The outputs at the positions of `read_rows`: [B, P, D], or y as it is."""
    if is_convolution(module):
        return _evenly(y.flatten(2).transpose(1, 2))
    return _evenly(y.flatten(1, 2)) if y.dim() == 4 else y


def _evenly(rows: torch.Tensor) -> torch.Tensor:
    """At most `POSITIONS` of the rows [B, P, ...] of a batch, the same of every example."""
    kept = max(POSITIONS // max(len(rows), 1), 1)
    return rows if rows.shape[1] <= kept else rows[:, places(rows.shape[1], kept)]


def places(of: int, kept: int) -> torch.Tensor:
    """So many numbers below another, at even distances."""
    return torch.arange(kept) * of // kept


def _unfold(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The channels under the kernel at each position, channel by channel, [B, P, C*kernel]."""
    if x.dim() == 3:  # over time: a picture of one row
        x = x[:, :, None]
    step: dict[str, Any] = {name: _both(getattr(module, name)) for name in ("dilation", "padding", "stride")}
    if len(module.kernel_size) == 1:
        step["padding"] = (0, step["padding"][1])
    return _evenly(functional.unfold(x, _both(module.kernel_size), **step).transpose(1, 2))


def _both(size: Sequence[int]) -> tuple[int, int]:
    return (size[0], size[1]) if len(size) == 2 else (1, size[0])
