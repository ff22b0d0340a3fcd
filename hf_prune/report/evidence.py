"""The record beside the weights: JSON files of what was kept, evaluated and measured, from which the card is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.history import PLAN_FILE, REPORT_FILE, is_of
from ..checkpoint.hub import HUB_ID
from ..checkpoint.layout import KEY
from ..checkpoint.proof import PROOF_FILE, weights_id
from ..files import read_json, write_text
from ..plan import PruningPlan
from .engines import config_of
from .int8 import INT8_FILE
from .quote import line
from .render import MEASUREMENTS

EVALUATION = "evaluation.json"
DENSE, PRUNED = "dense", "pruned"


@dataclass(frozen=True)
class Evidence:
    """What the files beside the weights say. A file that is missing, or that is of other weights, counts as empty."""

    directory: Path

    def _json(self, name: str) -> Any:
        path = self.directory / name
        return read_json(path) if path.is_file() else {}

    def _of_these_weights(self, name: str) -> Any:
        found = self._json(name)
        return found if found.get("weights") == weights_id(self.directory) else {}

    @property
    def there(self) -> list[str]:
        """The files that hold the evidence."""
        names = ("config.json", PLAN_FILE, REPORT_FILE, PROOF_FILE, EVALUATION, MEASUREMENTS, INT8_FILE)
        return [name for name in names if (self.directory / name).is_file()]

    def check(self) -> None:
        """Raise ValueError for a file that is not JSON or not of the model of config.json; the message names it."""
        for name in self.there:
            self._json(name)
        weights_id(self.directory)
        named = self.summary.get("plan", self.plan.hash)
        if not is_of(self.plan, named, self.config["model_type"]):
            raise ValueError(
                f"{self.directory / PLAN_FILE} is the plan {self.plan.hash[:12]} of a {line(self.plan.model_type)}; "
                f"config.json is of a {self.config['model_type']} cut by {line(named)[:12]}. Restore it, or save again."
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        return config_of(self.directory)

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.directory / PLAN_FILE)

    @cached_property
    def cuts(self) -> list[dict[str, Any]]:
        return list(self._json(REPORT_FILE).get("cuts", ()))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """{"dataset", "split", "rows", "command", "results": {"dense": {metric: value}, "pruned": {...}}}"""
        return self._of_these_weights(EVALUATION)

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """What `hf-prune bench DENSE DIRECTORY --out DIRECTORY` found of the first model and of this one."""
        first, *others = self._json(MEASUREMENTS).values() or ({},)
        ours = [found for found in others if found["weights"] and found["weights"] == weights_id(self.directory)]
        return {DENSE: first, PRUNED: ours[0]} if ours else {}

    @cached_property
    def int8(self) -> list[dict[str, Any]]:
        """What `int8.compare_int8` found, one entry an engine."""
        return list(self._of_these_weights(INT8_FILE).get("engines", ()))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the config says of the pruning; nothing where all was kept."""
        return self.config[KEY]

    @property
    def origin(self) -> str:
        """The Hub id of what was pruned, or the name of its directory; "" where that is not known."""
        return str(self.summary.get("base_model") or "")

    @property
    def base_model(self) -> str:
        """The Hub id of what was pruned; "" where it was a directory."""
        return self.origin if HUB_ID.fullmatch(self.origin) else ""

    def cost(self, key: str) -> tuple[float, float]:
        """(dense, pruned); key as in `costs.report`: macs_model, params_blocks, ..."""
        said = self.summary or self.plan.cost
        return said["before"][key], said["after"][key]

    def share(self, key: str) -> float:
        before, after = self.cost(key)
        return after / before

    def metrics(self) -> dict[str, tuple[float | None, float]]:
        """name -> (dense, pruned)"""
        results = self.evaluation.get("results", {})
        return {name: (results.get(DENSE, {}).get(name), value) for name, value in results.get(PRUNED, {}).items()}


def write_evaluation(
    directory: Path, results: Mapping[str, Any], *, dataset: str, split: str, rows: int | None, command: str
) -> None:
    """Write evaluation.json. results: {"dense": {metric: value}, "pruned": {...}}; the dense ones may be missing."""
    found = {"dataset": dataset, "split": split, "rows": rows, "command": command, "results": results}
    write_text(directory / EVALUATION, json.dumps({"weights": weights_id(directory), **found}, indent=1) + "\n")
