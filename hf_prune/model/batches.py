"""Draw calibration examples from whatever holds them, and hand them to a model without touching them.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .axes import STEM
from .offload import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100
SHIFT = "prepare_decoder_input_ids_from_labels"  # method of most models with an encoder and a language model
TARGETS = ("labels", "start_positions", "end_positions")
SOUND = {"input_values", "input_features"}
LABEL_NAMES = {"label": "labels", "label_ids": "labels"}  # which transformers' collators rename, too
HELD_OUT_EVERY = 5  # every fifth example accepts or refuses a repair
BATCH_TOKENS = 2048  # of a batch drawn from a Dataset: a language model's logits are as wide as its vocabulary
GUARD = 2  # the held-out set of examples of another source
GUARD_SHARE = 4  # examples of another source that also do: at most a quarter of the calibration examples


@dataclass
class Batch:
    """A few examples: model inputs without targets, the targets, and which held-out set each is in [B], 0 for none."""

    inputs: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    held_out: torch.Tensor

    @property
    def size(self) -> int:
        return len(self.held_out)

    @property
    def tokens(self) -> int:
        """Real tokens; 0 of pictures."""
        ids, mask = self.inputs.get("input_ids"), self.inputs.get("attention_mask")
        if ids is None:
            return 0
        return int(mask.bool().sum()) if mask is not None and mask.shape == ids.shape else ids.numel()


def draw(
    model: PreTrainedModel,
    data: Any,
    samples: int,
    seed: int,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    guard: Any = None,
) -> list[Batch]:
    """At most `samples` examples, drawn evenly over all of `data`, on the model's device.

    `data` is a list or iterable of batches (dicts of tensors, first axis B), a DataLoader, or a datasets.Dataset with
    `processing_class` or `data_collator`. Nothing in it is modified. Every fifth is held out (set 1); all of `guard`,
    data of another source in one of the same forms, are (set 2), at most a quarter of `samples`.

    Raises:
        ValueError: fewer than 8 examples, or data in another form.
    """

    def rows(source: Any, count: int) -> list[dict[str, torch.Tensor]]:
        if _is_dataset(source):
            return _collate(model, source, count, seed, processing_class, data_collator, batch_size)
        return _pick_rows([_checked(model, batch) for batch in _iterate(source)], count, seed)

    batches = rows(data, samples)
    total = sum(len(next(iter(batch.values()))) for batch in batches)
    if total < 8:
        raise ValueError(f"{total} calibration examples: at least 8 are needed (hundreds are better).")
    position, drawn = 0, []
    for batch in batches:
        size = len(next(iter(batch.values())))
        held_out = (torch.arange(position, position + size) % HELD_OUT_EVERY) == HELD_OUT_EVERY - 1
        drawn.append(_positioned(model, prepare(model, batch, held_out.to(torch.int8))))
        position += size
    for batch in [] if guard is None else rows(guard, max(samples // GUARD_SHARE, 1)):
        size = len(next(iter(batch.values())))
        drawn.append(_positioned(model, prepare(model, batch, torch.full((size,), GUARD, dtype=torch.int8))))
    return drawn


def _is_dataset(data: Any) -> bool:
    return hasattr(data, "column_names") and hasattr(data, "select")


def _iterate(data: Any) -> Iterable[Any]:
    if isinstance(data, Mapping | str) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is a {type(data).__name__}; give a list or iterable of batches (dicts of tensors), a DataLoader, or "
            "a datasets.Dataset with processing_class= or data_collator=."
        )
    return data


def _checked(model: PreTrainedModel, batch: Any) -> dict[str, torch.Tensor]:
    """The tensors of a batch; labels under the name that models know."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"A batch is a {type(batch).__name__}; it must be a dict of tensors for model(**batch).")
    named = {LABEL_NAMES.get(str(key), str(key)): value for key, value in batch.items() if value is not None}
    known = {*inspect.signature(model.forward).parameters, *TARGETS}
    wrong = [key for key, value in named.items() if key in known and not _is_readable(value)]
    tensors = {key: value for key, value in named.items() if _is_readable(value) and value.dim()}
    if wrong or not tensors or len({len(value) for value in tensors.values()}) != 1:
        raise ValueError(
            "Each batch must be a dict of real tensors that agree in their first axis (the examples); found "
            f"{', '.join(f'{key}: {form(value)}' for key, value in named.items()) or 'nothing'}."
        )
    return tensors


def _is_readable(value: Any) -> bool:
    """Whether a value is a tensor of numbers that are there; no examples are none too many."""
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_complex():
        return False
    return value.numel() > 0 or (value.dim() > 0 and len(value) == 0)


def form(value: Any) -> str:
    """Type and size, for an error.

    >>> form(torch.zeros(2, 3))
    'float32 [2, 3]'
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{'meta ' if value.is_meta else ''}{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def even_positions(total: int, samples: int, seed: int) -> list[int]:
    """Sorted positions: one at random from each of `samples` equal strata of `total`."""
    if samples >= total:
        return list(range(total))
    edges = torch.arange(samples + 1) * total // samples  # whole numbers: no position is in two strata
    offsets = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (edges[:-1] + (offsets * (edges[1:] - edges[:-1])).long()).tolist()


def _pick_rows(batches: list[dict[str, torch.Tensor]], samples: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """The drawn rows, rows of the same shapes in one batch, batches no larger than the largest given."""
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    largest = max(sizes, default=1)
    owners = [(i, row) for i, size in enumerate(sizes) for row in range(size)]
    groups: dict[Any, list[dict[str, torch.Tensor]]] = {}
    for position in even_positions(len(owners), samples, seed):
        index, row = owners[position]
        example = {key: value[row] for key, value in batches[index].items()}
        shape = tuple((key, tuple(value.shape)) for key, value in example.items())
        groups.setdefault(shape, []).append(example)
    return [
        {key: torch.stack([row[key] for row in rows[start : start + largest]]) for key in rows[0]}
        for rows in groups.values()
        for start in range(0, len(rows), largest)
    ]


def _collate(
    model: PreTrainedModel,
    data: Any,
    samples: int,
    seed: int,
    processing_class: Any,
    data_collator: Any,
    batch_size: int,
) -> list[dict[str, torch.Tensor]]:
    collator = data_collator or _default_collator(processing_class)
    inputs = set(inspect.signature(model.forward).parameters) - {*TARGETS}
    keep = [name for name in data.column_names if name in inputs | {*TARGETS, *LABEL_NAMES}]
    if not inputs.intersection(keep):
        raise ValueError(
            f"The dataset's columns {data.column_names} hold no input of {type(model).__name__}; tokenise it first."
        )
    words = [name for name in keep if getattr(data.features[name], "dtype", "") in ("string", "large_string")]
    if words:
        raise ValueError(
            f"The dataset's columns {words} hold strings, where {type(model).__name__} takes numbers: map labels by "
            "model.config.label2id, and tokenise texts."
        )
    chosen = data.select(even_positions(len(data), samples, seed)).select_columns(keep)
    rows = sorted((chosen[i] for i in range(len(chosen))), key=_length)  # little padding
    groups: list[list[Any]] = [[]]
    for row in rows:
        if len(groups[-1]) == batch_size or (len(groups[-1]) + 1) * _length(row) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(row)
    return [_checked(model, collator(group)) for group in groups if group]


def _length(row: Mapping[str, Any]) -> int:
    ids = row.get("input_ids")
    return len(ids) if ids is not None else 0


def _default_collator(processing_class: Any) -> Any:
    from transformers import DataCollatorWithPadding, default_data_collator

    if processing_class is not None and hasattr(processing_class, "pad"):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def prepare(model: Any, batch: Mapping[str, torch.Tensor], held_out: torch.Tensor) -> Batch:
    parameters = inspect.signature(model.forward).parameters
    device = device_of(model)
    moved = {key: value.to(device) for key, value in batch.items()}
    targets = {key: moved.pop(key) for key in TARGETS if key in moved}
    inputs = {key: value for key, value in moved.items() if key in parameters}
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    if _is_seq2seq_lm(model) and "decoder_input_ids" not in inputs:
        if "labels" not in targets:
            raise ValueError(
                f"{type(model).__name__} needs labels or decoder_input_ids in every batch; found {sorted(batch)}."
            )
        inputs["decoder_input_ids"] = _shifted(model, targets["labels"])
    return Batch(inputs, targets, held_out.to(device))


def _is_seq2seq_lm(model: Any) -> bool:
    predicts = hasattr(model, SHIFT) or model.get_output_embeddings() is not None
    return bool(model.config.is_encoder_decoder) and predicts


def _shifted(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """What the decoder reads for these labels: those before them. Not every class has a method for it."""
    if hasattr(model, SHIFT):
        ids: torch.Tensor = getattr(model, SHIFT)(labels=labels)
        return ids
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    before = torch.cat([start, labels[:, :-1]], 1)
    return before.masked_fill(before == IGNORE, model.config.pad_token_id)


def is_causal_lm(model: PreTrainedModel) -> bool:
    # transformers names no loss type for GPT2LMHeadModel and falls back to the causal one
    named = getattr(model, "loss_type", None) == "ForCausalLM" or "LMHeadModel" in type(model).__name__
    return named and not model.config.is_encoder_decoder


def _positioned(model: PreTrainedModel, batch: Batch) -> Batch:
    """Left-padded texts of a language model get the positions that `generate` gives them: 0 at the first real token."""
    mask = batch.inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask[:, 0].all() or not is_causal_lm(model):
        return batch
    if "position_ids" not in batch.inputs and "position_ids" in inspect.signature(model.forward).parameters:
        batch.inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return batch


def forward_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Arguments for `model(**...)`: the inputs, without a cache."""
    return {**batch.inputs, **({"use_cache": False} if _takes(model, "use_cache") else {})}


def _takes(model: Any, name: str) -> bool:
    """Whether a model has an argument, or hands it on to one inside it."""
    from transformers import PreTrainedModel

    parameters = inspect.signature(model.forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    inside = [model.base_model] if model.base_model is not model else model.children()
    return name in parameters or (
        hands_on and any(_takes(each, name) for each in inside if isinstance(each, PreTrainedModel))
    )


def token_mask(model: PreTrainedModel, batch: Batch, stack: str) -> torch.Tensor | None:
    """True at real tokens [B*T] of a stack's side (several choices: [B*C*T]); None without padding to know of."""
    if stack == "decoder" and model.config.is_encoder_decoder:
        mask = batch.inputs.get("decoder_attention_mask")
        labels = batch.targets.get("labels")
        if mask is None and labels is not None and labels.dim() == 2 and _is_seq2seq_lm(model):
            mask = labels != IGNORE
        if mask is None and "decoder_input_ids" not in batch.inputs:
            mask = batch.inputs.get("attention_mask")  # a classifier that feeds its input to both sides
    else:
        mask = batch.inputs.get("attention_mask")
    if stack in ("vision", STEM) or (stack == "encoder" and batch.inputs.keys() & SOUND):
        return None  # patches, positions of a stem, or more samples than tokens
    if mask is None or (mask.dim() != 2 and mask.shape != getattr(batch.inputs.get("input_ids"), "shape", None)):
        return None  # none, or one of pairs of tokens
    return mask.flatten().bool()
