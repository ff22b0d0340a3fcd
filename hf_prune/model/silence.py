"""Parts of a live model made silent, as if they were cut: columns that read zeros, layers that hand their input on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .sites import tensor_of


@contextlib.contextmanager
def zeroed(root: nn.Module, path: str, kept: torch.Tensor, dim: int) -> Iterator[None]:
    """A tensor with zeros wherever an index along a dimension is not kept."""
    tensor = tensor_of(root, path)
    before = tensor.data
    mask = torch.zeros(tensor.shape[dim], dtype=tensor.dtype, device=tensor.device)
    mask[kept] = 1
    tensor.data = before * mask.view(-1, *[1] * (tensor.dim() - dim - 1))
    try:
        yield
    finally:
        tensor.data = before


@contextlib.contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """A layer that hands its hidden states on as they came."""
    first = next(iter(inspect.signature(layer.forward).parameters))

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs[first]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = layer.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
