"""Open models, tokenizers and text by name, as the command line needs them, and score a model on held-out rows."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .anatomy import quiet
from .batches import IGNORE, Batch, even_positions, forward_inputs, prepare
from .losses import example_losses, has_loss

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "article", "body", "question", "prompt")
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "sentiment")
MESSAGES = "messages"
TASKS = {  # pipeline task -> the Auto class that opens a model for it
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "fill-mask": "AutoModelForMaskedLM",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "feature-extraction": "AutoModel",
}
WITHOUT_PIPELINE = ("question-answering", "text2text-generation")  # transformers 5 dropped these pipelines
BATCH_SIZE = 32
MIN_ROWS = 10  # 8 to calibrate with, 2 to evaluate on
EVALUATION_ROWS = 1000
EVALUATION_TOKENS = 65536  # for language models
MASKED_SHARE = 0.15
Rows = list[dict[str, Any]]
Batches = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """Where text lies and which columns hold it; None means guessed."""

    name: str
    text_column: str | None = None
    label_column: str | None = None
    split: str | None = None


@dataclass
class Parts:
    """Batches to calibrate with, and batches of other rows to evaluate on."""

    calibration: Batches
    evaluation: Batches


# --- models ----------------------------------------------------------------------------------------------------------


def load_model(name: str, task: str | None = None, **options: Any) -> PreTrainedModel:
    """Open a directory or Hub id with the class that its config names, or with the Auto class of a `task`.

    Raises:
        ValueError: the config names no class, or one that transformers has not.
        FileNotFoundError: a path, not a Hub id, that is no directory.
    """
    import transformers

    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # never a Hub id
        name = os.path.expanduser(name)
        if not Path(name, "config.json").is_file():
            raise FileNotFoundError(f"{name}: no directory with a config.json. Give one, or a Hub id (owner/name).")

    if task is not None:
        return getattr(transformers, TASKS[task]).from_pretrained(name, **options).eval()
    config = transformers.AutoConfig.from_pretrained(name, revision=options.get("revision"))
    return model_class(config, name).from_pretrained(name, **options).eval()


def model_class(config: Any, name: str = "") -> Any:
    """The class that a config names.

    Raises:
        ValueError: it names none, or one that transformers has not.
    """
    import transformers

    architecture = (config.architectures or [""])[0]
    if not hasattr(transformers, architecture or "?"):
        raise ValueError(
            f"{name}: config.json names the class {architecture or 'nowhere'!r}, which transformers has not. "
            f"Say the task: {', '.join(TASKS)}."
        )
    return getattr(transformers, architecture)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_data(
    source: Source, model: PreTrainedModel, tokenizer: Any, sequence_length: int, samples: int, seed: int = 0
) -> Parts:
    """Tokenised batches of `source` for a model: at most `samples` rows to calibrate with, and a held-out part.

    Both parts are drawn evenly over all rows with `seed`; a fifth, at most 1,000 rows (language models: 65,536
    tokens), is held out. Language models get blocks of `sequence_length` tokens packed from the joined text, other
    models one truncated row per text.

    Raises:
        ValueError: a column is missing or cannot be guessed; a label is unknown; too few rows.
        FileNotFoundError: no such file or dataset.
    """
    encode, limit = _encoder(model, sequence_length)
    rows = encode(Task(source, model, tokenizer, sequence_length), read(source))
    if len(rows) < MIN_ROWS:
        raise ValueError(
            f"{source.name} gives {len(rows)} examples of {sequence_length} tokens; at least {MIN_ROWS} are needed "
            "(hundreds are better). Give more data, or a shorter sequence_length."
        )
    evaluation = even_positions(len(rows), min(max(len(rows) // 5, 2), limit), seed)
    chosen = set(evaluation)
    rest = [i for i in range(len(rows)) if i not in chosen]
    calibration = [rest[i] for i in even_positions(len(rest), samples, seed)]
    generator = torch.Generator().manual_seed(seed)
    return Parts(
        *(_collate(model, tokenizer, [rows[i] for i in part], generator) for part in (calibration, evaluation))
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

    try:
        found = _load(source, path)
    except exceptions.DatasetGenerationError as error:
        raise ValueError(f"{source.name} cannot be read as {FORMATS.get(path.suffix)}: {error.__cause__}") from error
    if not len(found):
        raise ValueError(f"{source.name} has no rows.")
    return found


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
    """The asked text column, or the one that can only be meant: a usual name, or the only column of strings."""
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
        return [tokenizer.apply_chat_template(messages, tokenize=False) for messages in values]
    wrong = next((value for value in values if not isinstance(value, str)), "")
    if wrong != "":
        raise ValueError(f"Column {column!r} holds {type(wrong).__name__} ({wrong!r}), not text in every row.")
    return list(values)


def _labels(model: PreTrainedModel, data: Dataset, column: str) -> list[Any]:
    """Labels as the model numbers them: names go through config.label2id, integers are kept."""
    values = data[column][:]
    known: dict[str, int] = dict(model.config.label2id or {})  # type: ignore[arg-type]
    names = getattr(data.features[column], "names", None)
    if names and set(names) <= set(known):  # the dataset's own numbering may be another
        values = [names[value] for value in values]
    if model.config.num_labels == 1 or any(isinstance(value, float) for value in values):
        return [float(value) for value in values]
    allowed: dict[Any, int] = known if isinstance(values[0], str) else {i: i for i in known.values()}
    unknown = sorted({str(value) for value in values if value not in allowed})
    if unknown:
        raise ValueError(
            f"Column {column!r} has labels that the model does not know: {', '.join(unknown[:10])}. The model knows "
            f"{', '.join(f'{name!r} ({i})' for name, i in known.items())}. Use a model trained on these labels, or "
            "rename them in the data."
        )
    return [allowed[value] for value in values]


# --- batches ---------------------------------------------------------------------------------------------------------


def _collate(model: PreTrainedModel, tokenizer: Any, rows: Rows, generator: torch.Generator) -> Batches:
    """Padded batches, rows of like length together."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    batches = [_pad(model, tokenizer, rows[i : i + BATCH_SIZE]) for i in range(0, len(rows), BATCH_SIZE)]
    if type(model).__name__.endswith("ForMaskedLM"):
        batches = [_mask(tokenizer, batch, generator) for batch in batches]
    return batches


def _pad(model: PreTrainedModel, tokenizer: Any, rows: Rows) -> dict[str, torch.Tensor]:
    pad = next(
        (i for i in (tokenizer.pad_token_id, model.config.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
    )
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
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids)) | (batch["attention_mask"] == 0)
    hidden = (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & ~special
    return {
        **batch,
        "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
        "labels": ids.masked_fill(~hidden, IGNORE),
    }


# --- evaluation ------------------------------------------------------------------------------------------------------


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
    labels = batch.targets.get("labels")
    counted = (
        batch.inputs.get("attention_mask", torch.ones_like(batch.inputs["input_ids"]))
        if labels is None
        else labels != IGNORE
    )
    return example_losses(model, output, batch), counted[:, 1:].sum(1).float()
