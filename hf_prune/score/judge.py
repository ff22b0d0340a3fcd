"""What a cut costs on rows that nothing was fitted to, so that unlike cuts can be compared.

Shapes: B examples, T tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..model.batches import IGNORE, Batch, forward_inputs
from ..model.weights import quiet
from .losses import has_loss, labels_of, predicts_tokens
from .passes import losses_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 256  # held-out rows that candidates are compared on, at most
Translate = Callable[[Batch], Batch]


@dataclass(frozen=True)
class Judge:
    """Held-out rows, of the guard where there is one, and how the dense model does on them.

    What is refitted looks best on the kind of text that it was refitted to: unlike cuts are compared on another one.
    """

    batches: Sequence[Batch]
    outputs: Sequence[torch.Tensor]  # of the dense model, [B, D], where there is no task loss
    dense: float

    @classmethod
    def of(cls, model: PreTrainedModel, batches: Sequence[Batch]) -> Judge:
        rows = _held_out(batches)
        if has_loss(model, rows):
            return cls(rows, (), _mean([_losses(model, batch, batch) for batch in rows]))
        return cls(rows, [_pooled(model, batch) for batch in rows], 0.0)

    def __call__(self, model: PreTrainedModel, translate: Translate = lambda batch: batch) -> float:
        """The mean over examples of the task loss; without one, of 1 - cosine between the mean hidden states (or the
        logits) and the dense model's.

        Args:
            translate: gives the rows in the tokens that the model has now. Losses over tokens are then summed over the
                row's new tokens and divided by the number of its old ones, so that longer rows are no gain.
        """
        rows = [translate(batch) for batch in self.batches]
        if not self.outputs:
            return _mean([_losses(model, now, was) for now, was in zip(rows, self.batches, strict=True)])
        pairs = zip((_pooled(model, batch) for batch in rows), self.outputs, strict=True)
        return _mean([1 - functional.cosine_similarity(found, wanted, dim=-1) for found, wanted in pairs])


def _held_out(batches: Sequence[Batch]) -> list[Batch]:
    """The rows of the last set: those of a guard, or else those of the calibration data."""
    last = max(int(batch.held_out.max()) for batch in batches)
    found: list[Batch] = []
    for batch in batches:
        rows = batch.held_out == last
        if rows.any() and sum(each.size for each in found) < ROWS:
            inputs, targets = ({k: v[rows] for k, v in part.items()} for part in (batch.inputs, batch.targets))
            found.append(Batch(inputs, targets, batch.held_out[rows]))
    return found


@torch.no_grad()
def _losses(model: PreTrainedModel, now: Batch, was: Batch) -> torch.Tensor:
    with quiet(model):
        losses = losses_of(model, now)
    if now is was or not predicts_tokens(model, now):
        return losses
    return losses * _labelled(model, now) / _labelled(model, was).clamp_min(1)


def _labelled(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    labels: Any = labels_of(model, batch)
    return (labels != IGNORE).sum(1).to(labels.device)


@torch.no_grad()
def _pooled(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """One vector an example [B, D]: the first output, its mean over real tokens where it has a row for each."""
    with quiet(model):
        output: torch.Tensor = model(**forward_inputs(model, batch))[0].float()
    if output.dim() < 3:
        return output.flatten(1)
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.shape != output.shape[:2]:
        return output.flatten(1, -2).mean(1)
    weights = mask[..., None].to(output)
    return (output * weights).sum(1) / weights.sum(1).clamp_min(1)


def _mean(values: Sequence[torch.Tensor]) -> float:
    """Over all rows; values: [B] of each batch."""
    return float(torch.cat(list(values)).double().mean())
