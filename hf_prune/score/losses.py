"""The task loss of each example, as criteria need it: independent of batch size, order and padding.

Shapes: B examples, T tokens, V classes or vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..model.batches import IGNORE, Batch, is_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> bool:
    """Whether a task loss can be computed: a head and labels, or a causal LM."""
    return has_head(model) and (is_causal_lm(model) or any(batch.targets for batch in batches))


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model predicts something that labels could say."""
    if model.get_output_embeddings() is not None:
        return True
    return model is not model.base_model or "For" in type(model).__name__


def predicts_tokens(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether every token has a prediction of its own (language models, token labels), not the example."""
    labels = labels_of(model, batch)
    return labels is not None and labels.dim() == 2 and not labels.is_floating_point()


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
    logits, labels = getattr(output, "logits", None), labels_of(model, batch)
    if logits is None or labels is None:
        raise ValueError(f"{type(model).__name__} with targets {sorted(targets)} gives no loss to score with.")
    if is_causal_lm(model):
        return _cross_entropy(logits[:, :-1], labels[:, 1:])
    if logits.dim() == 3:
        return _cross_entropy(logits, labels)
    return _sequence_loss(model, logits.float(), labels)


def predictions(model: PreTrainedModel, output: Any, batch: Batch) -> list[torch.Tensor]:
    """Logits at everything that the batch labels, as rows [n, V] over which a softmax is a prediction.

    A regressed value stays alone in its row (V = 1); each label of several at once has a row [logit, 0].
    """
    if "start_positions" in batch.targets and hasattr(output, "start_logits"):
        return [_real(output.start_logits, batch), _real(output.end_logits, batch)]
    logits, labels = output.logits, labels_of(model, batch)
    if is_causal_lm(model) and labels is not None:
        return [_labelled(logits[:, :-1], labels[:, 1:])]
    if logits.dim() == 3:
        return [_labelled(logits, labels) if labels is not None else logits.flatten(0, 1)]
    problem = None if labels is None else problem_of(model, logits.shape[-1], labels)
    if problem == "multi_label_classification":
        return [torch.stack([logits, torch.zeros_like(logits)], -1).flatten(0, 1)]
    return [logits.reshape(-1, 1) if problem == "regression" else logits]


def _labelled(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T, V], [B, T] -> [n, V]. Where all is labelled nothing is gathered, nor scattered in the backward pass."""
    wanted, rows = (labels != IGNORE).flatten(), logits.flatten(0, 1)
    return rows if wanted.all() else rows.index_select(0, wanted.nonzero().squeeze(1))


def with_drawn_labels(model: PreTrainedModel, output: Any, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with labels drawn from what the model predicts, at the tokens that are labelled.

    The gradients of their loss have the Fisher information as second moment: the curvature of the KL divergence from
    the model itself.
    """
    if "start_positions" in batch.targets and hasattr(output, "start_logits"):
        logits = {"start_positions": output.start_logits, "end_positions": output.end_logits}
        return replace(batch, targets={key: _draw(_real(value, batch), generator) for key, value in logits.items()})
    logits, labels = output.logits.detach(), labels_of(model, batch)
    if labels is None:
        raise ValueError(f"{type(model).__name__} with targets {sorted(batch.targets)} gives no loss to score with.")
    if is_causal_lm(model):
        following = torch.cat([labels[:, :1], _draw(logits[:, :-1], generator)], 1)
        return replace(batch, targets={"labels": following.masked_fill(labels == IGNORE, IGNORE)})
    if logits.dim() == 3:
        return replace(batch, targets={"labels": _draw(logits, generator).masked_fill(labels == IGNORE, IGNORE)})
    problem = problem_of(model, logits.shape[-1], labels)
    if problem == "regression":
        noise = torch.randn(logits.shape, generator=generator).to(logits.device)
        drawn = (logits.float() + noise * math.sqrt(0.5)).view(
            labels.shape
        )  # exp(-(y - f)²) is the squared error's likelihood
    elif problem == "multi_label_classification":
        drawn = (torch.rand(logits.shape, generator=generator).to(logits.device) < logits.float().sigmoid()).float()
    else:
        drawn = _draw(logits, generator).view(labels.shape)
    return replace(batch, targets={"labels": drawn})


def _draw(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One class for each row of logits [B, ..., V] -> [B, ...]; one example at a time, a vocabulary is wide."""
    rows = (example.detach().float().softmax(-1).cpu().reshape(-1, logits.shape[-1]) for example in logits)
    drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row in rows])
    return drawn.view(logits.shape[:-1]).to(logits.device)


def labels_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor | None:
    """The labels, without those of padding; those of a causal LM are its inputs where none are given.

    What follows left padding is no label either: it would be predicted from padding.
    """
    labels, mask, is_causal = batch.targets.get("labels"), batch.inputs.get("attention_mask"), is_causal_lm(model)
    if labels is None and is_causal:
        labels = batch.inputs.get("input_ids")
    if labels is None or mask is None or labels.shape != mask.shape or "decoder_input_ids" in batch.inputs:
        return labels
    padded = mask == 0
    if is_causal:
        padded = padded | functional.pad(padded[:, :-1], (1, 0), value=False)
    return labels.masked_fill(padded, IGNORE)


def _real(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Logits over tokens [B, T] that no padded token can win."""
    mask = batch.inputs.get("attention_mask")
    return logits if mask is None else logits.masked_fill(mask == 0, torch.finfo(logits.dtype).min)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, V] and [B], or [B, T, V] and [B, T] -> [B]: the mean over labels that count."""
    labels = counted_labels(labels, logits.shape[-1]).view(len(labels), -1)
    losses = token_losses(logits.reshape(*labels.shape, -1), labels)
    return losses.sum(1) / (labels != IGNORE).sum(1).clamp_min(1)


def counted_labels(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """The labels, those outside of 0..V-1 (IGNORE, clipped answers) as IGNORE."""
    return labels.masked_fill((labels < 0) | (labels >= classes), IGNORE)


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cross entropy at each token in fp32, 0 where the label is IGNORE: [B, T, V] and [B, T] -> [B, T]."""
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(labels.shape)


def problem_of(model: PreTrainedModel, classes: int, labels: torch.Tensor) -> str:
    """What a head with one output an example learns, in transformers' words."""
    if model.config.problem_type is not None:
        return model.config.problem_type
    if classes == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _sequence_loss(model: PreTrainedModel, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    problem = problem_of(model, logits.shape[-1], labels)
    if problem == "regression":
        return (logits - labels.float().view_as(logits)).square().mean(1)
    if problem == "multi_label_classification":
        return functional.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(1)
    return _cross_entropy(logits, labels)
