"""The card of a model that a run saves, with what `evaluate` found during the run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE_FORMATS = ("csv", "json", "parquet", "arrow", "text", "pandas", "generator")  # `datasets` takes them for names
FIELDS = {  # ours -> transformers' name of what `push_to_hub` may say
    "license": "license",
    "language": "language",
    "tags": "tags",
    "base_model": "finetuned_from",
    "datasets": "dataset_tags",
}
NOT_QUALITY = ("_runtime", "_per_second", "_time", "epoch")  # endings of what `evaluate` reports beside the quality


class Card:
    """What `evaluate` found of a model before its cut and at each step after it, until a card is written."""

    def __init__(self) -> None:
        self._found: dict[int | None, tuple[Any, dict[str, float]]] = {}  # step -> data, metrics; None: before the cut

    def add(self, step: int | None, rows: Any, metrics: Mapping[str, Any], prefix: str) -> None:
        """Keep what was found.

        Args:
            step: of the weights; None before the cut.
            rows: the evaluated data.
            metrics: as `evaluate` returns them, with this prefix.
        """
        quality = {k: v for k, v in metrics.items() if isinstance(v, float) and not k.endswith(NOT_QUALITY)}
        self._found[step] = rows, {name.removeprefix(f"{prefix}_"): value for name, value in quality.items()}

    def forget(self) -> None:
        """Forget what was found after a cut."""
        self._found = {step: found for step, found in self._found.items() if step is None}

    def write(self, directory: Path, step: int, **given: Any) -> None:
        """Write the card of weights of this step. If that fails there is a warning: the weights are already saved.

        Only here are the report's modules imported: to train and to save needs none of them.

        Args:
            given: arguments of `hf_prune.report.card.write_card`.
        """
        try:
            from ..report.card import write_card
            from ..report.evidence import DENSE, PRUNED, write_evaluation

            rows, pruned = self._found.get(step, (None, {}))
            of_dense, dense = self._found.get(None, (None, {}))
            if pruned:
                results = {DENSE: dense if of_dense is rows else {}, PRUNED: pruned}
                write_evaluation(directory, results, **_described(rows), command="PruningTrainer.evaluate()")
            write_card(directory, **given)
        except Exception as error:  # of any kind
            warnings.warn(f"{directory} is saved, but not its card ({error!r}); see `hf-prune card`.", stacklevel=2)


def _described(rows: Any) -> dict[str, Any]:
    """What a card says of the evaluated data: dataset, split, how many rows."""
    name = getattr(getattr(rows, "info", None), "dataset_name", None)
    return {
        "dataset": name if name and name not in FILE_FORMATS else "the evaluation data of the run",
        "split": str(getattr(rows, "split", None) or "evaluation"),
        "rows": len(rows) if hasattr(rows, "__len__") and not isinstance(rows, dict) else None,
    }


def stated(
    stock: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None
) -> dict[str, Any]:
    """What a call of the stock `create_model_card` states, as arguments of `write_card`; with the name on the Hub."""
    said = inspect.signature(stock).bind(*args, **kwargs).arguments
    given = {ours: said.get(theirs) for ours, theirs in FIELDS.items()} | {"name": name or said.get("model_name")}
    given = {key: [v] if key in ("tags", "datasets") and isinstance(v, str) else v for key, v in given.items()}
    return {key: value for key, value in given.items() if value}
