"""A model as a plan would leave it, by masks: the same outputs as after the cut, at the dense cost."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..plan import PruningPlan
from .anatomy import Anatomy
from .cut import index_of
from .sites import tensor_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def masked(model: PreTrainedModel, anatomy: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """What reads a removed unit reads zeros, and a removed layer hands its input on. All is as before afterwards.

    Tokens that go are not masked: compare the logits at those that stay.
    """
    plan.check(anatomy.model_type, anatomy.words)
    with contextlib.ExitStack() as stack:
        for site in anatomy.sites:
            chosen, layer = plan.get(site.key), model.get_submodule(site.path)
            if chosen is None:
                continue
            left = site.expand(chosen.axis, chosen.kept)
            for part in (part for part in site.parts if part.role == "reads"):
                stack.enter_context(
                    _zeroed(layer, part.tensor, index_of(part, left, site.sizes, site.widths), part.dim)
                )
        for extent in anatomy.extents:
            layers = plan.layers(extent.where[0], extent.of) if extent.path else range(extent.of)
            for gone in sorted({*range(extent.of)} - {*layers}):
                stack.enter_context(skipped(model.get_submodule(f"{extent.path}.{gone}")))
        yield


@contextlib.contextmanager
def _zeroed(root: nn.Module, path: str, kept: torch.Tensor, dim: int) -> Iterator[None]:
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
