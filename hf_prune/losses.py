"""The task loss of each example, as criteria need it: independent of batch size, order and padding.

Shapes: B examples, T tokens, V classes or vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from .batches import IGNORE, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> bool:
    """Whether a task loss can be computed: a head and labels, or a causal LM."""
    if model.get_output_embeddings() is None and not _has_task_head(model):
        return False
    return all(batch.targets for batch in batches) or _is_causal_lm(model)


def _is_causal_lm(model: PreTrainedModel) -> bool:
    # transformers names no loss type for GPT2LMHeadModel and falls back to the causal one
    named = getattr(model, "loss_type", None) == "ForCausalLM" or "LMHeadModel" in type(model).__name__
    return named and not model.config.is_encoder_decoder


def _has_task_head(model: PreTrainedModel) -> bool:
    return model is not model.base_model or "For" in type(model).__name__


def example_losses(model: PreTrainedModel, output: Any, batch: Batch) -> torch.Tensor:
    """The task loss of each example [B], in fp32: the mean over its labelled tokens.

    Raises:
        ValueError: no labels fit the model's outputs.
    """
    targets = batch.targets
    if "start_positions" in targets and hasattr(output, "start_logits"):
        start = _cross_entropy(_real(output.start_logits, batch), targets["start_positions"])
        end = _cross_entropy(_real(output.end_logits, batch), targets["end_positions"])
        return (start + end) / 2
    logits, labels = getattr(output, "logits", None), targets.get("labels")
    if logits is None or (labels is None and not _is_causal_lm(model)):
        raise ValueError(f"{type(model).__name__} with targets {sorted(targets)} gives no loss to score with.")
    if labels is None:
        labels = batch.inputs["input_ids"]
        if "attention_mask" in batch.inputs:
            labels = labels.masked_fill(batch.inputs["attention_mask"] == 0, IGNORE)
    if _is_causal_lm(model):
        return _cross_entropy(logits[:, :-1], labels[:, 1:])
    if logits.dim() == 3:
        return _cross_entropy(logits, labels)
    return _sequence_loss(model, logits.float(), labels)


def _real(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits over tokens [B, T] that no padded token can win."""
    mask = batch.inputs.get("attention_mask")
    return logits if mask is None else logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, V] and [B], or [B, T, V] and [B, T] -> [B]; labels outside 0..V-1 (IGNORE, clipped answers) do not count."""
    labels = labels.masked_fill((labels < 0) | (labels >= logits.shape[-1]), IGNORE)
    losses = functional.cross_entropy(
        logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(len(labels), -1)
    return losses.sum(1) / (labels.view(len(labels), -1) != IGNORE).sum(1).clamp_min(1)


def _sequence_loss(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    problem = model.config.problem_type
    if problem is None:
        if logits.shape[-1] == 1:
            problem = "regression"
        else:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "regression":
        return (logits - labels.float().view_as(logits)).square().mean(1)
    if problem == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)
    return _cross_entropy(logits, labels.view(-1))
