"""Batches that are tokenised already, in the tokens of a shorter vocabulary.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..model.batches import IGNORE, Batch
from .translating import translator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS = ("input_ids", "decoder_input_ids", "labels")
Rows = list[list[int]]


def batch_translator(
    before: PreTrainedTokenizerBase,
    after: PreTrainedTokenizerBase,
    labels_are_tokens: bool,
    longest: int | None = None,
) -> Callable[[Batch], Batch]:
    """A function from batches in the tokens of `before` to batches in those of `after`.

    A row gets longer where a removed token is spelled out. Where something else belongs to each of its tokens (labels
    of tokens, segments, a decoder's inputs), it stays as long: a removed token becomes the first piece of its spelling.
    Rows of more than `longest` tokens lose those before the last.
    """
    translate = translator(before, after)
    new: dict[int, int] = {}  # of tokens by themselves

    def one(token: int) -> int:
        if token not in new:
            new[token] = token if token < 0 else translate([token])[0]
        return new[token]

    def in_place(ids: torch.Tensor) -> torch.Tensor:
        return ids.new_tensor([one(i) for i in ids.flatten().tolist()]).view(ids.shape)

    def batch_of(batch: Batch) -> Batch:
        names = [name for name in IDS if name != "labels" or labels_are_tokens]
        if _is_free(batch, labels_are_tokens):
            rows = [_shortened(translate(row), longest) for row in _real(batch)]
            return _longer(batch, rows, one(_padding(batch)), labels_are_tokens)
        inputs, targets = (
            {name: in_place(value) if name in names else value for name, value in part.items()}
            for part in (batch.inputs, batch.targets)
        )
        return replace(batch, inputs=inputs, targets=targets)

    return batch_of


def _is_free(batch: Batch, labels_are_tokens: bool) -> bool:
    """Whether nothing but the attention mask, and labels that repeat the inputs, belongs to each token."""
    ids = batch.inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or "decoder_input_ids" in batch.inputs:
        return False
    beside = {k: v for k, v in batch.inputs.items() if k not in ("input_ids", "attention_mask")}
    beside.pop("token_type_ids", None) if not batch.inputs.get("token_type_ids", ids[:0]).any() else None
    labels = batch.targets.get("labels")
    repeats = labels is None or labels.shape != ids.shape or (labels_are_tokens and _repeats(labels, ids))
    return not beside and repeats and "start_positions" not in batch.targets


def _repeats(labels: torch.Tensor, ids: torch.Tensor) -> bool:
    return bool(((labels == ids) | (labels == IGNORE)).all() and (labels != IGNORE).any(1).all())


def _mask(batch: Batch) -> torch.Tensor:
    ids = batch.inputs["input_ids"]
    return batch.inputs.get("attention_mask", torch.ones_like(ids)).bool()


def _real(batch: Batch) -> Rows:
    return [ids[mask].tolist() for ids, mask in zip(batch.inputs["input_ids"], _mask(batch), strict=True)]


def _shortened(row: list[int], longest: int | None) -> list[int]:
    return row if longest is None or len(row) <= longest else [*row[: longest - 1], row[-1]]


def _padding(batch: Batch) -> int:
    """The token at padded places; any where there is none."""
    ids = batch.inputs["input_ids"]
    padded = ids[~_mask(batch)]
    return int(padded[0] if len(padded) else ids[0, 0])


def _longer(batch: Batch, rows: Sequence[Sequence[int]], padding: int, labels_are_tokens: bool) -> Batch:
    """The batch with these rows, padded on the side that it is padded on."""
    ids, mask = batch.inputs["input_ids"], _mask(batch)
    length, left = max(map(len, rows)), not bool(mask[:, 0].all())
    new = ids.new_full((len(rows), length), padding)
    real = torch.zeros_like(new)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        new[index, place], real[index, place] = ids.new_tensor(row), 1
    inputs = {"input_ids": new, **({"attention_mask": real} if "attention_mask" in batch.inputs or left else {})}
    if "token_type_ids" in batch.inputs:
        inputs["token_type_ids"] = torch.zeros_like(new)
    if len({*map(len, rows)}) > 1:
        inputs["attention_mask"] = real
    targets = dict(batch.targets)
    if labels_are_tokens and targets.get("labels") is not None and targets["labels"].shape == ids.shape:
        targets["labels"] = new.masked_fill(real == 0, IGNORE)
    return replace(batch, inputs=inputs, targets=targets)
