"""Score a model on held-out rows, by the metric of its task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..model.batches import IGNORE, Batch, forward_inputs, prepare
from ..model.weights import quiet
from ..score.losses import example_losses, has_loss, labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def evaluate(model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]]) -> tuple[str, float]:
    """(metric, value): accuracy of a classifier, perplexity of a causal LM over its tokens, else the mean loss.

    A model without a head or data without labels gives ("loss", nan).
    """
    prepared = [
        prepare(model, batch, torch.zeros(len(next(iter(batch.values()))), dtype=torch.bool)) for batch in batches
    ]
    if not has_loss(model, prepared):
        return "loss", math.nan
    metric, per_example = _metric(model, prepared[0])
    total = weight = 0.0
    with quiet(model), torch.inference_mode():
        for batch in tqdm(prepared, desc="evaluate", leave=False):
            values, weights = per_example(model, model(**forward_inputs(model, batch)), batch)
            total += (values * weights).sum().item()
            weight += weights.sum().item()
    return metric, math.exp(total / weight) if metric == "perplexity" else total / weight


def _metric(model: PreTrainedModel, batch: Batch) -> tuple[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    name, labels = type(model).__name__, batch.targets.get("labels")
    if labels is not None and labels.dim() == 1 and not labels.is_floating_point() and "Classification" in name:
        return "accuracy", _correct
    if getattr(model, "loss_type", None) == "ForCausalLM" and not model.config.is_encoder_decoder:
        return "perplexity", _token_losses
    return "loss", _losses


def _correct(model: PreTrainedModel, output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    right = (output.logits.argmax(-1) == batch.targets["labels"]).float()
    return right, torch.ones_like(right)


def _losses(model: PreTrainedModel, output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    losses = example_losses(model, output, batch)
    return losses, torch.ones_like(losses)


def _token_losses(model: PreTrainedModel, output: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels: Any = labels_of(model, batch)
    return example_losses(model, output, batch), (labels[:, 1:] != IGNORE).sum(1).float()
