"""How much each hidden channel matters: a gate on it wherever a norm hands the stream to its readers.

All that reads the stream reads it behind a norm, in front of a sublayer (pre-norm) or at its end (post-LN). One gate a
channel is shared by all of them, so that its gradient for an example is the sum over the whole stream.

Shapes: B examples, T tokens, n real tokens, D hidden width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..model.batches import Batch, forward_inputs, token_mask
from ..model.offload import device_of, real
from ..model.sites import Extent, module_of, tensor_of
from ..model.weights import quiet
from .criteria import CRITERIA, Criterion, SiteStatistics
from .passes import backward, recomputed
from .statistics import Sums, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OF_OUTPUTS = {"fisher_joint": "fisher_obs"}  # what sees each consumer's outputs has none here: its nearest relative


def norms_of(model: nn.Module, extent: Extent) -> list[str]:
    """The modules that scale each channel of the stream by a weight of its own."""
    return [
        module_of(part.tensor)
        for part in extent.parts
        if part.tensor.endswith(".weight") and tensor_of(model, part.tensor).dim() == 1
    ]


def channel_scores(
    model: PreTrainedModel,
    extent: Extent,
    batches: Sequence[Batch],
    criterion: Criterion,
    seed: int,
    layers: Sequence[nn.Module] = (),
) -> torch.Tensor:
    """The importance of each channel [D] by a criterion, which reads the statistics of the whole stream.

    Args:
        layers: of the stream, of which one at a time is kept for a backward pass.

    Raises:
        ValueError: scores that are no numbers.
    """
    criterion = CRITERIA[OF_OUTPUTS.get(criterion.name, criterion.name)]
    generator = torch.Generator().manual_seed(seed)
    known: dict[str, Any] = {}
    with quiet(model):
        if criterion.needs_loss:
            draw = generator if criterion.labels == "model" else None
            known |= _gradients(model, extent, batches, draw, layers)
        if {"gram", "moments"} & {*criterion.needs}:
            known |= _moments(model, extent, batches)
    reads, every = (_squares(model, extent, roles) for roles in (("reads",), ("reads", "makes", "carries")))
    found = criterion.score(SiteStatistics(extent.of, reads.sqrt()[None], every, generator=generator, **known))
    if not bool(found.isfinite().all()):
        raise ValueError(f"The {criterion.name} scores of the hidden channels are NaN or infinite. Check the weights.")
    return found


def _gradients(
    model: PreTrainedModel,
    extent: Extent,
    batches: Sequence[Batch],
    draw: torch.Generator | None,
    layers: Sequence[nn.Module],
) -> dict[str, torch.Tensor]:
    """The mean square and the mean absolute value over examples of each gate's gradient, [D]."""
    square, absolute = torch.zeros(2, extent.of, device=device_of(model))
    for batch in batches:
        gradient = gate_gradients(model, extent, batch, draw, layers)
        square += gradient.square().sum(0)
        absolute += gradient.abs().sum(0)
    examples = sum(batch.size for batch in batches)
    return {"gate_square": square.cpu() / examples, "gate_abs": absolute.cpu() / examples}


def gate_gradients(
    model: PreTrainedModel,
    extent: Extent,
    batch: Batch,
    draw: torch.Generator | None = None,
    layers: Sequence[nn.Module] = (),
) -> torch.Tensor:
    """Of each example's loss with respect to the gates at 1, [B, D].

    Args:
        layers: that are run again in the backward pass.
        draw: draw the labels from the model's own predictions with this generator instead.
    """
    gate = torch.ones(batch.size, extent.of, device=device_of(model), requires_grad=True)

    def multiplied(output: torch.Tensor) -> torch.Tensor:
        rows = output.float().reshape(batch.size, -1, extent.of)
        return (rows * gate[:, None]).reshape(output.shape).to(output.dtype)

    with torch.enable_grad(), recomputed(layers), _behind_norms(model, extent, multiplied):
        backward(model, batch, draw)
    return torch.zeros_like(gate) if gate.grad is None else gate.grad


@torch.no_grad()
def _moments(model: PreTrainedModel, extent: Extent, batches: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
    """Mean, mean square and second moments of what the norms give, over all of them and all real tokens."""
    sums = Sums(extent.of, device_of(model), full=True)
    for batch in batches:
        mask = token_mask(model, batch, "")

        def add(output: torch.Tensor, mask: torch.Tensor | None = mask) -> None:
            fits = mask is not None and mask.numel() * extent.of == output.numel()  # not behind a pooler
            sums.add(rows_of(output, mask if fits else None))

        with _behind_norms(model, extent, add):
            model(**forward_inputs(model, batch))
    return sums.means()


@contextlib.contextmanager
def _behind_norms(model: nn.Module, extent: Extent, do: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    handles = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: do(output))
        for path in norms_of(model, extent)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _squares(model: nn.Module, extent: Extent, roles: Sequence[str]) -> torch.Tensor:
    """Sum of squares of a channel's weights in matrices (and vectors) of these roles, [D]."""
    total = torch.zeros(extent.of)
    for part in extent.parts:
        if part.role in roles:
            with real(model.get_submodule(module_of(part.tensor))):
                weight = tensor_of(model, part.tensor).detach()
                total += weight.float().square().movedim(part.dim, 0).reshape(extent.of, -1).sum(1).cpu()
    return total
