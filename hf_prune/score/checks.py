"""Calibration data checked against its model, before anything is scored: what a pass would stumble over, or pass over
without a word.

Shapes: B examples, T tokens, V classes or vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..model.batches import IGNORE, Batch, form, forward_inputs
from ..model.tokens import input_embeddings
from ..model.weights import quiet
from .losses import is_causal_lm, labels_of, problem_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 5  # values in an error
STUMBLES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError)  # of a model over foreign data

PICTURES = ("pixel_values",)

# --- inputs ----------------------------------------------------------------------------------------------------------


def check_inputs(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Raise ValueError for inputs that the model cannot read, or that hold nothing to read."""
    for batch in batches:
        _check_ids(model, batch)
        _check_mask(batch)
    masks = [batch.inputs["attention_mask"] for batch in batches if "attention_mask" in batch.inputs]
    if len(masks) == len(batches) and not any(bool(mask.any()) for mask in masks):
        raise ValueError("The attention_mask is 0 everywhere: no example has a token. 1 marks real tokens, 0 padding.")
    for batch in _kinds(batches):
        outputs_of(model, batch)
    for batch, row in _extremes(batches):
        outputs_of(model, batch, row)


def idle_towers(stacks: Iterable[str], batches: Sequence[Batch]) -> set[str]:
    """The vision tower of a model where no batch holds a picture: all its units would count as idle, so it stays whole.

    Raises:
        ValueError: some batches hold pictures and some do not.
    """
    seen = [bool(batch.inputs.keys() & PICTURES) for batch in batches]
    if "vision" not in stacks or all(seen):
        return set()
    if any(seen):
        raise ValueError(
            f"This model has a vision tower, and {seen.count(False)} of {len(seen)} batches hold no picture "
            f"({', '.join(PICTURES)}): its units cannot be scored alike. Give pictures with all texts, or with none."
        )
    warnings.warn(
        f"This model has a vision tower, and no batch holds a picture ({', '.join(PICTURES)}): it stays as it is. Give "
        "pictures beside the texts to cut it too.",
        stacklevel=4,
    )
    return {"vision"}


def _check_ids(model: PreTrainedModel, batch: Batch) -> None:
    main, found = model.main_input_name, sorted(batch.inputs)
    if main not in batch.inputs and "inputs_embeds" not in batch.inputs:
        raise ValueError(f"{type(model).__name__} reads {main}; the batches hold {', '.join(found) or 'no input'}.")
    for name, ids in batch.inputs.items():
        embedding = next(input_embeddings(model), None) if name.endswith("input_ids") else None
        if embedding is None:
            continue
        if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() < 2:
            raise ValueError(
                f"{name} is {form(ids)}; token ids are whole numbers [B, T], examples by tokens. An example alone is "
                "[1, T]."
            )
        wrong = (ids < 0) | (ids >= embedding.num_embeddings)
        if wrong.any():
            raise ValueError(
                f"{name} holds {_values(ids[wrong])}; {type(model).__name__} knows the tokens 0 to "
                f"{embedding.num_embeddings - 1}. Tokenise with this model's own tokenizer."
            )


def _check_mask(batch: Batch) -> None:
    for name in ("", "decoder_"):
        ids, mask = (batch.inputs.get(f"{name}{what}") for what in ("input_ids", "attention_mask"))
        if ids is None or mask is None:
            continue
        is_same = mask.shape == ids.shape
        if not is_same and (mask.dim() <= ids.dim() or mask.shape[-1] != ids.shape[-1]):
            raise ValueError(
                f"{name}attention_mask is {form(mask)}, {name}input_ids {form(ids)}: 1 or 0 for each token is needed."
            )
        if is_same and not bool(mask.isfinite().all()):
            raise ValueError(f"{name}attention_mask holds {_values(mask)}; 1 marks real tokens, 0 padding.")


def _kinds(batches: Sequence[Batch]) -> Iterable[Batch]:
    """The longest batch of each kind: the same tensors, and the same sizes but for the last."""
    kinds: dict[Any, Batch] = {}
    for batch in sorted(batches, key=lambda b: max(v.shape[-1] for v in b.inputs.values())):
        kinds[_kind(batch)] = batch
    return kinds.values()


def _kind(batch: Batch) -> Any:
    return tuple(sorted((name, v.dim(), tuple(v.shape[1:-1])) for name, v in (batch.inputs | batch.targets).items()))


def _extremes(batches: Sequence[Batch]) -> Iterable[tuple[Batch, int]]:
    """Where the greatest and the least of the whole numbers beside the tokens are: segments, positions."""
    named = {name for batch in batches for name, value in batch.inputs.items() if not value.is_floating_point()}
    for name in sorted(name for name in named if not name.endswith(("input_ids", "attention_mask"))):
        for sign in (1, -1):
            each = [
                ((sign * b.inputs[name].long()).reshape(b.size, -1).amax(1), b) for b in batches if name in b.inputs
            ]
            greatest, batch = max(each, key=lambda found: int(found[0].max()))
            yield batch, int(greatest.argmax())


@torch.no_grad()
def outputs_of(model: PreTrainedModel, batch: Batch, row: int = 0) -> Any:
    """What the model gives for two examples of a batch, one of them this row.

    Raises:
        ValueError: it cannot run them.
    """
    rows = [row, (row + 1) % batch.size]
    few = replace(batch, inputs={name: value[rows] for name, value in batch.inputs.items()})
    try:
        with quiet(model):
            return model(**forward_inputs(model, few))
    except STUMBLES as error:
        inputs = ", ".join(f"{name} {form(value)}" for name, value in few.inputs.items())
        raise ValueError(
            f"{type(model).__name__} cannot run what it is calibrated on ({inputs}): {type(error).__name__}: {error}"
        ) from error


# --- labels ----------------------------------------------------------------------------------------------------------


def fit_labels(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Give all labels the form that the loss takes.

    Raises:
        ValueError: labels that do not fit what the model gives, that only some batches have, or of which none counts.
    """
    unlabelled = sum(not batch.targets for batch in batches)
    if unlabelled == len(batches) and is_causal_lm(model):
        return  # every token is a label
    if unlabelled:
        raise ValueError(f"{unlabelled} of {len(batches)} batches have no labels: label all of them, or none.")
    outputs = {_kind(batch): outputs_of(model, batch) for batch in _kinds(batches)}
    for batch in batches:
        batch.targets = _fitted(model, batch, outputs[_kind(batch)])
    if not any(_counts(model, batch) for batch in batches):
        raise ValueError(
            f"No label counts: all are {IGNORE}, padding or out of reach. Give labels of what is predicted."
        )


def _counts(model: PreTrainedModel, batch: Batch) -> bool:
    if "start_positions" in batch.targets:
        length = batch.inputs[model.main_input_name].shape[-1]
        return any(bool(((value >= 0) & (value < length)).any()) for value in batch.targets.values())
    labels: Any = labels_of(model, batch)
    return bool((labels != IGNORE).any())


def _fitted(model: PreTrainedModel, batch: Batch, output: Any) -> dict[str, torch.Tensor]:
    if hasattr(output, "start_logits"):
        return {name: _position(model, batch, name) for name in ("start_positions", "end_positions")}
    logits, labels = getattr(output, "logits", None), batch.targets.get("labels")
    if logits is None or labels is None or logits.dim() not in (2, 3):
        raise ValueError(
            f"The labels {', '.join(batch.targets)} give no loss that is known for {type(model).__name__} (outputs "
            f"{', '.join(output)}). Leave them out and take criterion='hessian', which needs no loss."
        )
    fit = _of_tokens if logits.dim() == 3 else _of_examples
    return {"labels": fit(model, batch, labels, logits.shape[-1])}


def _position(model: PreTrainedModel, batch: Batch, name: str) -> torch.Tensor:
    positions = batch.targets.get(name)
    if positions is None or positions.is_floating_point() or positions.numel() != batch.size:
        found = "missing" if positions is None else form(positions)
        raise ValueError(f"{name} is {found}; {type(model).__name__} learns from one whole number an example, [B].")
    _check_range(name, positions, None)
    return positions.reshape(-1).long()


def _of_tokens(model: PreTrainedModel, batch: Batch, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """[B, T], a class for each token that the model predicts at."""
    ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    if labels.is_floating_point() or labels.dim() != 2 or (ids is not None and labels.shape != ids.shape):
        raise ValueError(
            f"labels are {form(labels)}; {type(model).__name__} predicts every token: whole numbers "
            f"{list(ids.shape) if ids is not None else '[B, T]'}, {IGNORE} where none counts."
        )
    _check_range("labels", labels, classes)
    return labels.long()


def _of_examples(model: PreTrainedModel, batch: Batch, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """[B] classes, or [B, V] numbers to regress or shares of several labels at once."""
    problem, name = problem_of(model, classes, labels), type(model).__name__
    if problem == "single_label_classification":
        if labels.is_floating_point() or labels.numel() != batch.size:
            raise ValueError(
                f"labels are {form(labels)}; {name} tells {classes} classes apart: whole numbers [B]. (Several labels "
                f"at once: floats [B, {classes}]. Another task: leave labels out, and take criterion='hessian'.)"
            )
        _check_range("labels", labels, classes)
        return labels.reshape(-1).long()
    if labels.numel() != batch.size * classes or not bool(labels.float().isfinite().all()):
        hint = " A class for each example is a whole number, [B]." if problem == "multi_label_classification" else ""
        raise ValueError(
            f"labels are {form(labels)}; {name} ({problem}) learns from finite numbers [B, {classes}].{hint}"
        )
    if problem == "multi_label_classification" and ((labels < 0) | (labels > 1)).any():
        raise ValueError(f"labels hold {_values(labels)}; {name} ({problem}) learns from 0 to 1 for each label.")
    return labels.float()


def _check_range(name: str, labels: torch.Tensor, classes: int | None) -> None:
    counting = labels[labels != IGNORE]
    wrong = counting[(counting < 0) | (counting >= (classes or torch.inf))]
    if not len(wrong):
        return
    allowed = "0 and more" if classes is None else f"0 to {classes - 1}"
    hint = " They seem to count from 1: subtract 1." if classes and counting.min() == 1 and classes in wrong else ""
    raise ValueError(f"{name} hold {_values(wrong)}; the model knows {allowed} ({IGNORE} does not count).{hint}")


def _values(found: torch.Tensor) -> str:
    values = found.unique().tolist()
    return ", ".join(map(str, values[:SHOWN])) + (", ..." if len(values) > SHOWN else "")
