"""Strings out of files and datasets of any size, a few at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "article", "body", "question", "prompt")
ROWS = 1000  # of a dataset that are read at once
LINE = 2**20  # characters of a line of a text file that are read at once
BATCH = 2**17  # characters of a batch of texts: some 20 MB once they are encoded


def strings(source: Any) -> Iterator[str]:
    """The texts of `source`, one by one and never all in memory.

    `source` is an iterable of strings; the path of a .txt (its lines, with their ends), .csv, .tsv, .json, .jsonl or
    .parquet file; a `datasets.Dataset` or `IterableDataset`; or a pair: (dataset, column) or (pathlib.Path, column).
    Where no column is named it is the one of a usual name (TEXT_COLUMNS), or the only one that holds strings. Empty
    cells are skipped.

    Raises (at the first text that is asked for, or at the row that is wrong):
        ValueError: an unknown ending, no rows, no such column or none that can be guessed, a row that is no text.
        FileNotFoundError: no such file. TypeError: nothing of the above.
    """
    is_pair = isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], str)
    holder, column = source if is_pair else (source, None)
    if isinstance(holder, str | os.PathLike):
        yield from _of_file(Path(holder).expanduser(), column)
    elif hasattr(holder, "column_names"):
        yield from _of_dataset(holder, column)
    elif isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        for row, text in enumerate(source):
            yield _text(text, f"Text {row + 1} of the vocabulary's texts")
    else:
        raise TypeError(
            f"The vocabulary's texts are strings, the path of a file, a dataset, or (dataset, column); got "
            f"{type(source).__name__}."
        )


def batched(texts: Iterable[str], characters: int = BATCH) -> Iterator[list[str]]:
    """Lists of about `characters` characters, so that memory does not depend on how long the texts are."""
    batch: list[str] = []
    length = 0
    for text in texts:
        batch.append(text)
        length += len(text) + 1  # empty texts count too
        if length >= characters:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _of_file(path: Path, column: str | None) -> Iterator[str]:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: files of texts end in {', '.join(FORMATS)}; found {path.suffix!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    try:
        yield from _lines(path) if FORMATS[path.suffix] == "text" else _of_batches(_batches(path), column)
    except ValueError as error:  # of datasets, pandas and pyarrow too: damaged files
        raise ValueError(f"{path}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from iter(partial(file.readline, LINE), "")


def _batches(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a file by columns, some at a time."""
    if FORMATS[path.suffix] == "parquet":  # datasets buffers what it has read: in the end, the file
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path, pre_buffer=False) as file:
            yield from (batch.to_pydict() for batch in file.iter_batches(ROWS))
        return
    from datasets import load_dataset

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    rows = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train", streaming=True, **options)
    yield from rows.iter(batch_size=ROWS)


def _of_dataset(dataset: Any, column: str | None) -> Iterator[str]:
    if isinstance(dataset, Mapping):
        raise ValueError(f"A dataset of several splits ({', '.join(dataset)}) holds the texts: give one of them.")
    yield from _of_batches(dataset.iter(batch_size=ROWS), column)


def _of_batches(batches: Iterable[Mapping[str, Any]], column: str | None) -> Iterator[str]:
    read, name = 0, ""
    for batch in batches:
        name = name or _column(batch, column)
        cells = enumerate(batch[name], start=read + 1)
        yield from (_text(text, f"Row {row} of column {name!r}") for row, text in cells if text is not None)
        read += len(batch[name])
    if not read:
        raise ValueError("The dataset of the vocabulary's texts has no rows.")


def _column(batch: Mapping[str, Any], asked: str | None) -> str:
    """The asked column of some rows, or the only one that can be meant."""
    texts = [name for name, values in batch.items() if any(isinstance(value, str) for value in values)]
    only = texts if len(texts) == 1 else []
    found = asked or next((name for name in (*TEXT_COLUMNS, *only) if name in texts), None)
    if found is not None and found in batch:
        return found
    problem = f"has no column {asked!r}" if asked else f"has no text column of a usual name ({', '.join(TEXT_COLUMNS)})"
    raise ValueError(
        f"The dataset of the vocabulary's texts {problem}. Columns: {', '.join(batch)}. Name it: (dataset, column)."
    )


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(
        f"{where} is {type(value).__name__}, not text. Drop such rows, or give strings: of messages, those of "
        "tokenizer.apply_chat_template(messages, tokenize=False)."
    )
