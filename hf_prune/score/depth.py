"""Which layers go: criteria over cached hidden states, by their published names.

Shapes: B examples, T tokens, n real tokens, D hidden width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from ..model import layerwise
from ..model.batches import Batch, forward_inputs, token_mask
from ..model.depth import without_layers
from ..model.layerwise import OUTPUT
from ..model.sites import Extent
from ..model.weights import quiet
from .passes import losses_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Order = Callable[[int], tuple[int, ...]]  # how many layers go -> which


def angle(cosine: torch.Tensor) -> torch.Tensor:
    """Over pi, 0 to 1 (Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", eq. 5)."""
    return torch.arccos(cosine.clamp(-1, 1)) / torch.pi


def turned(cosine: torch.Tensor) -> torch.Tensor:
    """1 - cosine (ShortGPT, Men et al. 2024, eq. 1)."""
    return 1 - cosine


@torch.no_grad()
def distances(
    model: PreTrainedModel, extent: Extent, batches: Sequence[Batch], between: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Mean over real tokens of the distance between the hidden states in front of two layers, [L+1, L+1].

    Args:
        between: distance of two states of this cosine.
    """
    layers: list[Any] = list(model.get_submodule(extent.path))  # type: ignore[call-overload]
    with quiet(model):
        stream = layerwise.capture(model, layers, [forward_inputs(model, batch) for batch in batches])
        total, tokens = torch.zeros(len(layers) + 1, len(layers) + 1, dtype=torch.float64), 0
        for index, batch in enumerate(tqdm(batches, desc=f"layers of {extent.where[0]}", leave=False)):
            states = [stream.states[index]]
            for layer, kwargs in zip(layers, stream.kwargs, strict=True):
                states.append(layerwise.run(layer, states[-1], kwargs[index])[OUTPUT])
            mask = token_mask(model, batch, extent.where[0])
            rows = [s.reshape(-1, s.shape[-1]) if mask is None else s.reshape(-1, s.shape[-1])[mask] for s in states]
            unit = torch.stack([functional.normalize(row.float(), dim=-1) for row in rows])  # [L+1, n, D]
            cosine = torch.einsum("ind,jnd->nij", unit, unit)
            total += between(cosine).double().sum(0).cpu()
            tokens += cosine.shape[0]
    return total / max(tokens, 1)


def angular(distance: torch.Tensor, fixed: Sequence[int]) -> Order:
    """The contiguous block over which the hidden states turn least (Gromov et al. 2024, section 3.2).

    The first layer, whose output every other builds on, and the last, which the head reads, stay while others can go.
    """
    layers = len(distance) - 1

    def order(count: int) -> tuple[int, ...]:
        starts = [s for s in range(layers - count + 1) if not {*fixed} & {*range(s, s + count)}]
        inner = [s for s in starts if s > 0 and s + count < layers]
        best = min(inner or starts, key=lambda start: float(distance[start, start + count]))
        return tuple(range(best, best + count))

    return order


def block_influence(distance: torch.Tensor, fixed: Sequence[int]) -> Order:
    """The layers that turn their input least, each for itself (ShortGPT, Men et al. 2024, section 3.2)."""
    return least([float(distance[i, i + 1]) for i in range(len(distance) - 1)], fixed)


def least(scores: Sequence[float], fixed: Sequence[int]) -> Order:
    """The layers of least score."""
    ascending = sorted((index for index in range(len(scores)) if index not in fixed), key=lambda index: scores[index])
    return lambda count: tuple(sorted(ascending[:count]))


def sleb(model: PreTrainedModel, extent: Extent, batches: Sequence[Batch], most: int) -> Order:
    """One layer after the other, always the one without which the loss is least (SLEB, Song et al. 2024, algorithm 1).

    Args:
        most: how many layers may be asked for.
    """
    gone: list[int] = []
    for _ in tqdm(range(most), desc="loss without each layer", leave=False):
        left = [index for index in range(extent.of) if index not in (*gone, *extent.axis.fixed)]
        gone.append(min(left, key=lambda index: _loss_without(model, extent, [*gone, index], batches)))
    return lambda count: tuple(sorted(gone[:count]))


def _loss_without(model: PreTrainedModel, extent: Extent, gone: Sequence[int], batches: Sequence[Batch]) -> float:
    with without_layers(model, extent, [index for index in range(extent.of) if index not in gone]):
        return mean_loss(model, batches)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """The task loss, its mean over the examples."""
    with quiet(model):
        losses = [losses_of(model, batch) for batch in batches]
    return float(torch.cat(losses).double().mean())


def random(layers: int, fixed: Sequence[int], seed: int) -> Order:
    """Layers at random: the control."""
    scores = torch.rand(layers, generator=torch.Generator().manual_seed(seed)).tolist()
    return least(scores, fixed)


BY_DISTANCE = {"angular": (angle, angular), "block_influence": (turned, block_influence)}


def order_of(
    criterion: str, model: PreTrainedModel, extent: Extent, batches: Sequence[Batch], seed: int, most: int
) -> Order:
    """The layers of a stack in the order of a criterion of `PruningConfig.layer_criterion`."""
    if criterion == "random":
        return random(extent.of, extent.axis.fixed, seed)
    if criterion == "sleb":
        return sleb(model, extent, batches, most)
    between, order = BY_DISTANCE[criterion]
    return order(distances(model, extent, batches, between), extent.axis.fixed)
