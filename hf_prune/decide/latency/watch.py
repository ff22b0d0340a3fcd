"""The realised latency of a cut: the model is timed before and after it, and a missed target warns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...config import PruningConfig
from ...model.anatomy import Anatomy
from ...model.weights import quiet
from ...plan import PruningPlan
from .cache import cache_directory, setting
from .clock import Bench, Inputs, against, inputs_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 15  # before and after a cut
TOLERANCE = 0.1  # of the asked fraction, beyond which a cut that missed it warns


@dataclass(frozen=True)
class Watch:
    """Times a model before and after its cut, each against a copy of one dense layer, so that a drift cancels."""

    bench: Bench
    inputs: Inputs
    setting: dict[str, Any]
    dense_ms: float
    ratio: float  # dense model over bench

    @classmethod
    def start(cls, model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> Watch:
        """Time the model that is about to be cut."""
        with quiet(model), torch.inference_mode():
            inputs = inputs_of(model, anatomy, config)
            site = next(site for site in anatomy.sites if site.active)
            bench = Bench.of(model, site, inputs).copy()
            return cls(bench, inputs, setting(model, anatomy, config), *against(bench, model, inputs, ROUNDS))

    def stop(self, model: PreTrainedModel, plan: PruningPlan) -> dict[str, Any]:
        """The realised latency of the model as it is now, at the speed that the machine had at the start."""
        with quiet(model), torch.inference_mode():
            _, ratio = against(self.bench, model, self.inputs, ROUNDS)
        keep, predicted = ratio / self.ratio, plan.cost.get("keep")
        _warn_if_missed(plan.config.get("keep", predicted), predicted, keep)
        return {
            "keep": keep,
            "dense_ms": self.dense_ms,
            "predicted_ms": None if predicted is None else predicted * self.dense_ms,
            "realised_ms": keep * self.dense_ms,
            **self.setting,
        }


def _warn_if_missed(asked: float | None, predicted: float | None, realised: float) -> None:
    if asked is None or predicted is None:
        return
    if predicted * (1 - TOLERANCE) <= realised <= asked * (1 + TOLERANCE):
        return
    slower = " (slower than the dense model)" if realised > 1 else ""
    warnings.warn(
        f"keep={asked:g} of the latency was asked, {predicted:.3f} predicted and {realised:.3f} realised{slower}: the "
        "machine may have been busy now or when its table was measured. Repeat on a quiet machine, after clearing "
        f"{cache_directory()}.",
        stacklevel=4,
    )
