"""Batches of tokens from a named file or dataset, to calibrate a model with and to evaluate it on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..model.batches import IGNORE, even_positions
from ..model.probe import positions
from ..model.tokens import input_embeddings
from ..plan import short
from ..vocabulary.reading import FORMATS, TEXT_COLUMNS
from .opening import read_as

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment")
MESSAGES = "messages"
BATCH_SIZE = 32
MIN_ROWS = 10  # 8 to calibrate with, 2 to evaluate on
EVALUATION_ROWS = 1000
EVALUATION_TOKENS = 65536  # for language models
MASKED_SHARE = 0.15
UNKNOWN_SHARE = 0.5  # of the tokens; from there on the tokenizer does not know the text
SHOWN = 10  # values in an error
Rows = list[dict[str, Any]]
Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """Where text lies and which columns hold it; a column that is None is guessed."""

    name: str
    text_column: str | None = None
    label_column: str | None = None
    split: str | None = None


@dataclass
class Parts:
    """Batches to calibrate with, batches of other rows to evaluate on, and the texts of them all."""

    calibration: Batches
    evaluation: Batches
    texts: Callable[[], Any]  # (dataset, column), or strings


# --- reading ---------------------------------------------------------------------------------------------------------


def load_data(
    source: Source, model: PreTrainedModel, tokenizer: Any, sequence_length: int, samples: int, seed: int = 0
) -> Parts:
    """Tokenised batches of `source` for a model: at most `samples` rows to calibrate with, and a held-out part.

    Both parts are drawn evenly over all rows with `seed`; a fifth, at most 1,000 rows (language models: 65,536
    tokens), is held out. Language models get blocks of `sequence_length` tokens packed from the joined text, other
    models one truncated row per text.

    Raises:
        ValueError: text cannot be prepared for such a model, or not of that length; a column is missing or cannot be
            guessed; a label is unknown; the tokenizer does not fit the model or the text; there are too few rows.
        FileNotFoundError: no such file or dataset.
    """
    encode, limit = _encoder(model, sequence_length)
    data = read(source)
    _check_length(model, sequence_length)
    rows = encode(Task(source, model, tokenizer, sequence_length), data)
    if len(rows) < MIN_ROWS:
        raise ValueError(
            f"{source.name} gives {len(rows)} examples of {sequence_length} tokens; at least {MIN_ROWS} are needed "
            "(hundreds are better). Give more data, or a shorter sequence_length."
        )
    _check_tokens(model, tokenizer, rows, source.name)
    evaluation = even_positions(len(rows), min(max(len(rows) // 5, 2), limit), seed)
    chosen = set(evaluation)
    rest = [i for i in range(len(rows)) if i not in chosen]
    calibration = [rest[i] for i in even_positions(len(rest), samples, seed)]
    generator = torch.Generator().manual_seed(seed)
    first, second = (
        _collate(model, tokenizer, [rows[i] for i in part], generator) for part in (calibration, evaluation)
    )
    return Parts(first, second, partial(_plain_texts, data, source, tokenizer, rows))


def _plain_texts(data: Dataset, source: Source, tokenizer: Any, rows: Rows) -> Any:
    """The texts of all rows: a column; of chats and of pairs of texts what the rows were tokenised from."""
    column, pairs = text_column(data, source), isinstance(rows[0].get("labels"), list)
    if column != MESSAGES and not pairs:
        return data, column
    return [tokenizer.decode(row[name]) for row in rows for name in ("input_ids", "labels") if name in row]


def check_reads_text(model: PreTrainedModel) -> None:
    """Raise ValueError for a model for which no text can be prepared here."""
    _encoder(model, 1)


def _check_length(model: PreTrainedModel, sequence_length: int) -> None:
    limit = positions(model)
    if limit is not None and sequence_length > limit:
        raise ValueError(
            f"sequence_length={sequence_length}: this {model.config.model_type} has {limit} positions. Set "
            f"sequence_length (--sequence-length) to at most {limit}."
        )


def _check_tokens(model: PreTrainedModel, tokenizer: Any, rows: Rows, name: str) -> None:
    """Raise ValueError for empty texts, for token ids that the model does not have, and for text of unknown words."""
    empty = [i for i, row in enumerate(rows) if not row["input_ids"]]
    if empty:
        raise ValueError(
            f"{name}: {len(empty)} of {len(rows)} texts have no token, row {empty[0] + 1} first. Drop them."
        )
    table = next(input_embeddings(model), None)
    largest = max(max(row["input_ids"]) for row in rows)
    if table is not None and largest >= table.num_embeddings:
        raise ValueError(
            f"The tokenizer gives the token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model "
            f"has {table.num_embeddings}: it is another model's. Name the one it was trained with (--tokenizer)."
        )
    unknown, special = tokenizer.unk_token_id, set(tokenizer.all_special_ids)
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return  # no unknown token, or one that also separates texts
    few = rows[:: len(rows) // EVALUATION_ROWS + 1]
    words = [i for row in few for i in row["input_ids"] if i == unknown or i not in special]
    if words and words.count(unknown) >= UNKNOWN_SHARE * len(words):
        raise ValueError(
            f"{words.count(unknown) / len(words):.0%} of the tokens of {name} are {tokenizer.unk_token}: the tokenizer "
            "does not know this text. Give text of the model's language, or the tokenizer that it was trained with "
            "(--tokenizer)."
        )


def read(source: Source) -> Dataset:
    """The rows of a file (by its ending), a directory or a datasets name ("name" or "name:configuration").

    Raises:
        FileNotFoundError: a file that does not exist. ValueError: unknown ending, unreadable, or empty.
    """
    path = Path(source.name).expanduser()
    if path.is_file() and path.suffix not in FORMATS:
        raise ValueError(f"{source.name}: data files end in {', '.join(FORMATS)}; found {path.suffix!r}.")
    if path.suffix in FORMATS and not path.is_file():
        raise FileNotFoundError(f"{source.name}: no such file.")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{source.name} is empty.")
    from datasets import exceptions

    with read_as(source.name, FORMATS.get(path.suffix, "a dataset")), _quiet_datasets():
        try:
            found = _load(source, path)
        except exceptions.DatasetGenerationError as error:
            raise ValueError(str(error.__cause__ or error)) from error
    if not len(found):
        raise ValueError(f"{source.name} has no rows.")
    return found


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep datasets from logging the errors that it raises as well."""
    from datasets import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load(source: Source, path: Path) -> Dataset:
    from datasets import load_dataset

    if path.is_file():
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(FORMATS[path.suffix], data_files=str(path), split=source.split or "train", **options)
    name, _, configuration = (str(path), "", "") if path.is_dir() else source.name.partition(":")
    found = load_dataset(name, configuration or None, split=source.split)
    return found["train" if "train" in found else next(iter(found))] if isinstance(found, Mapping) else found


# --- encoding: rows of token lists -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What rows of tokens are made of: the text, and the model, tokenizer and tokens a row that they are made for."""

    source: Source
    model: PreTrainedModel
    tokenizer: Any
    sequence_length: int

    def tokenize(self, data: Dataset, column: str, **options: Any) -> list[list[int]]:
        """Token ids of a column, row by row."""

        def ids(rows: Mapping[str, Any]) -> dict[str, Any]:
            return {"ids": self.tokenizer(_texts(self.tokenizer, column, rows[column]), **options)["input_ids"]}

        encoded = data.select_columns([column]).map(ids, batched=True, remove_columns=[column], desc="tokenise")
        return encoded["ids"][:]

    def truncated(self, data: Dataset, column: str) -> list[list[int]]:
        special = column != MESSAGES  # a chat template writes its own special tokens
        return self.tokenize(data, column, truncation=True, max_length=self.sequence_length, add_special_tokens=special)


def _encoder(model: PreTrainedModel, sequence_length: int) -> tuple[Callable[[Task, Dataset], Rows], int]:
    """How this kind of model reads text, and how many rows to evaluate on."""
    name = type(model).__name__
    text_rows = max(EVALUATION_TOKENS // sequence_length, 2)
    for ending, encoder, limit in (
        ("ForSequenceClassification", _classification, EVALUATION_ROWS),
        ("ForMaskedLM", _plain, text_rows),
        ("ForConditionalGeneration", _sequence_to_sequence, EVALUATION_ROWS),
        ("ForCausalLM", _packed, text_rows),
        ("LMHeadModel", _packed, text_rows),
        ("Model", _plain, EVALUATION_ROWS),  # without a head
    ):
        if name.endswith(ending) and model.main_input_name == "input_ids":
            return encoder, limit
    raise ValueError(
        f"Text for {name} cannot be prepared here; known are sequence classification, language models (causal, masked, "
        "sequence to sequence) and encoders without a head. In Python, hf_prune.prune(model, batches) takes any "
        "batches for model(**batch)."
    )


def _classification(task: Task, data: Dataset) -> Rows:
    if task.model.config.pad_token_id is None:
        raise ValueError(
            f"{type(task.model).__name__} reads the last token before the padding, and its config names no "
            "pad_token_id. Set it in config.json, to the id that the model was trained with."
        )
    column = text_column(data, task.source)
    labels = _labels(task.model, data, _known(data, task.source.label_column, LABEL_COLUMNS, "label"))
    return [
        {"input_ids": ids, "labels": label} for ids, label in zip(task.truncated(data, column), labels, strict=True)
    ]


def _plain(task: Task, data: Dataset) -> Rows:
    return [{"input_ids": ids} for ids in task.truncated(data, text_column(data, task.source)) if len(ids) > 2]


def _sequence_to_sequence(task: Task, data: Dataset) -> Rows:
    if task.source.label_column is None:
        raise ValueError(
            f"{type(task.model).__name__} learns from pairs of texts: name the target text's column as label column. "
            f"Columns: {', '.join(data.column_names)}."
        )
    inputs = task.truncated(data, text_column(data, task.source))
    targets = task.truncated(data, _known(data, task.source.label_column, (), "label"))
    return [{"input_ids": ids, "labels": labels} for ids, labels in zip(inputs, targets, strict=True)]


def _packed(task: Task, data: Dataset) -> Rows:
    """All texts joined, cut into blocks of exactly `sequence_length` tokens; what is left over is dropped."""
    column = text_column(data, task.source)
    if Path(task.source.name).suffix == ".txt":
        data = data.map(lambda rows: {column: [f"{line}\n" for line in rows[column]]}, batched=True, desc="lines")
        between: list[int] = []
    else:
        between = [task.tokenizer.eos_token_id] if task.tokenizer.eos_token_id is not None else []
    tokens: list[int] = []
    for ids in task.tokenize(data, column, add_special_tokens=False):
        tokens += [*ids, *between] if ids else []
    length = task.sequence_length
    return [{"input_ids": tokens[i : i + length]} for i in range(0, len(tokens) - length + 1, length)]


def text_column(data: Dataset, source: Source) -> str:
    """The text column that was asked for, else one of a usual name, else the only column of strings."""
    if source.text_column is None and MESSAGES in data.column_names:
        return MESSAGES
    strings = [name for name, kind in data.features.items() if getattr(kind, "dtype", "") in ("string", "large_string")]
    only = tuple(strings) if len(strings) == 1 else ()
    return _known(data, source.text_column, (*TEXT_COLUMNS, *only), "text")


def _known(data: Dataset, asked: str | None, usual: Sequence[str], what: str) -> str:
    found = asked or next((name for name in usual if name in data.column_names), None)
    if found in data.column_names:
        return str(found)
    problem = f"has no column {asked!r}" if asked else f"has no {what} column of a usual name ({', '.join(usual)})"
    raise ValueError(
        f"The data {problem}. Columns: {', '.join(data.column_names)}. Name one with {what}_column "
        f"(--{what}-column on the command line)."
    )


def _texts(tokenizer: Any, column: str, values: Sequence[Any]) -> list[str]:
    if values and isinstance(values[0], list):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"Column {column!r} holds messages, and this model's tokenizer has no chat template. "
                "Give a column of plain text."
            )
        with read_as(column, "messages of a role and a content, as the chat template reads them"):
            return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in values]
    wrong = next((value for value in values if not isinstance(value, str)), "")
    if wrong != "":
        raise ValueError(f"Column {column!r} holds {type(wrong).__name__} ({wrong!r}), not text in every row.")
    return list(values)


def _labels(model: PreTrainedModel, data: Dataset, column: str) -> list[Any]:
    """Labels as the model numbers them: names go through config.label2id, numbers are kept.

    Raises:
        ValueError: rows without a label, or labels that the model does not know.
    """
    values = data[column][:]
    missing = [i for i, value in enumerate(values) if value is None]
    if missing:
        raise ValueError(
            f"Column {column!r} has no label in {len(missing)} of {len(values)} rows, row {missing[0] + 1} first. Give "
            "them one, or drop them."
        )
    if model.config.num_labels == 1:
        return _numbers(values, column)
    known: dict[str, int] = dict(model.config.label2id or {})  # type: ignore[arg-type]
    names = getattr(data.features[column], "names", None)
    if names and set(names) <= set(known):  # the dataset's own numbering may be another
        values = [names[value] if value >= 0 else value for value in values]
    allowed: dict[Any, int] = {**known, **{i: i for i in known.values()}}
    unknown = {short(value) for value in values if not isinstance(value, str | int | float) or value not in allowed}
    if unknown:
        ids = {value for value in values if isinstance(value, int)}
        hint = " They seem to count from 1: subtract 1." if ids and (min(ids), max(ids)) == (1, len(known)) else ""
        raise ValueError(
            f"Column {column!r} has labels that the model does not know: {_some(sorted(unknown))}.{hint} The model "
            f"knows {_some([f'{name!r} ({i})' for name, i in known.items()])}. Use a model trained on these labels, or "
            "rename them in the data."
        )
    return [allowed[value] for value in values]


def _numbers(values: Sequence[Any], column: str) -> list[float]:
    wrong = {short(v) for v in values if not isinstance(v, int | float) or isinstance(v, bool) or not math.isfinite(v)}
    if wrong:
        raise ValueError(
            f"Column {column!r} holds {_some(sorted(wrong))}; the model has one output: give finite numbers."
        )
    return [float(value) for value in values]


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:SHOWN]) + (", ..." if len(values) > SHOWN else "")


# --- batches ---------------------------------------------------------------------------------------------------------


def _collate(model: PreTrainedModel, tokenizer: Any, rows: Rows, generator: torch.Generator) -> Batches:
    """Padded batches, each of rows of similar length."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [_pad(model, tokenizer, rows[i : i + BATCH_SIZE]) for i in range(0, len(rows), BATCH_SIZE)]
    if type(model).__name__.endswith("ForMaskedLM"):
        batches = [_mask(tokenizer, batch, generator) for batch in batches]
    return batches


def _pad(model: PreTrainedModel, tokenizer: Any, rows: Rows) -> dict[str, torch.Tensor]:
    # the model's own first: some classifiers look for it to find the last token
    choices = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((i for i in choices if i is not None and i >= 0), 0)
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    batch = {
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
    }
    if "labels" not in rows[0]:
        return batch
    labels = [torch.tensor(row["labels"]) for row in rows]
    batch["labels"] = (
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE)
        if labels[0].dim()
        else torch.stack(labels)
    )
    return batch


def _mask(tokenizer: Any, batch: Mapping[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Some tokens become the mask token and must be guessed; special tokens and padding stay."""
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "The model fills masks, and its tokenizer has no mask token. Give the model's own (--tokenizer)."
        )
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
    hidden = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & ~special
    return {
        **batch,
        "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hidden, IGNORE),
    }
