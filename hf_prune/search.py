"""One budget over unlike units: divisions of it are tried, and compared by what they lose on held-out rows.

What is predicted for layers, for tokens and for the units of sites has different meanings, so that predictions only
choose which divisions are tried (`decide.prices`): each is cut, repaired, measured and undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .decide.prices import next_to_try
from .decide.units import follow_the_stream
from .execute import Repair, execute_, touched
from .model.anatomy import Anatomy
from .model.configs import all_configs
from .model.depth import without_layers
from .model.sites import Extent
from .model.undo import undone
from .model.weights import quiet
from .model.wide import HIDDEN
from .plan import Kept, PruningPlan, Where
from .score.depth import Order
from .score.judge import Judge, Translate
from .vocabulary.choice import token_configs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Option = tuple[tuple[Kept, ...], float]  # what stays of a kind of units, and what is predicted to be lost
WHOLE: Option = ((), 0.0)
STEPS = 8  # numbers of layers, at most, without which the loss is measured for predictions
Allocate = Callable[[Sequence[Kept]], PruningPlan]  # of the rest of the budget, to the units of sites


@dataclass(frozen=True)
class Division:
    """Layers, tokens and channels that stay, the plan that keeps the budget with them, and what it loses."""

    plan: PruningPlan
    wide: tuple[Kept, ...] = ()
    others: tuple[float, ...] = ()  # predicted for what goes of each kind of them, each in its own measure
    measured: float | None = None

    @property
    def predicted(self) -> tuple[float, ...]:
        """For the units of sites, and for the others."""
        return (self.plan.cost["predicted_loss"], *self.others)

    @property
    def is_alike(self) -> bool:
        """Whether all layers of a stack keep the same counts."""
        counts = {(kept.where[0], kept.where[2], len(kept.kept)) for kept in self.plan.sites}
        return len(counts) == len({count[:2] for count in counts})

    def row(self) -> dict[str, Any]:
        """For the report."""
        return {
            "kept": {" ".join(dict.fromkeys((*k.where, k.axis))): [len(k.kept), k.of] for k in self.wide},
            "alike": self.is_alike,
            "keep": self.plan.cost.get("keep"),
            "predicted_losses": self.predicted,
            "held_out_loss": self.measured,
        }


def least_predicted(divisions: Sequence[Division]) -> Division:
    """By the sum of what is predicted, though of unlike kinds: where nothing is measured."""
    return min(divisions, key=lambda division: sum(division.predicted))


@dataclass
class Search:
    """What may be tried on a model: orders in which layers go, vocabularies, and who judges."""

    anatomy: Anatomy
    judge: Judge
    orders: Mapping[Where, Order] = field(default_factory=dict)  # by stack
    vocabularies: Mapping[tuple[int, ...], float] = field(default_factory=dict)  # ever smaller ones -> share lost
    translate: Callable[[Sequence[int]], Translate] | None = None  # rows into the tokens of a vocabulary
    channels: Mapping[tuple[int, ...], float] = field(default_factory=dict)  # ever fewer -> share of their score lost
    without: Mapping[int, float] = field(default_factory=dict)  # layers gone -> loss, see `measure_`

    @property
    def is_wide(self) -> bool:
        """Whether layers, tokens or hidden channels may go."""
        return bool(self.orders or self.vocabularies or self.channels)

    def measure_(self, model: PreTrainedModel) -> None:
        """What missing layers alone cost, without any repair: at a few numbers of them, for predictions."""
        for gone in dict.fromkeys(_thinned(range(self._most() + 1), STEPS)):
            missing = [(self.anatomy.extent(*k.where), k.kept) for k in self._layers(gone) if not k.is_identity]
            self.without = {**self.without, gone: _without(model, missing, self.judge) - self.judge.dense}

    def divisions(self, allocate: Allocate) -> list[Division]:
        """Divisions that reach the budget: from the fewest layers gone to the most that help.

        Raises:
            ValueError: none reaches it.
        """
        layers = [(tuple(self._layers(gone)), self._missed(gone)) for gone in range(self._most() + 1)]
        tokens = [(tuple(self._tokens(kept)), lost) for kept, lost in self.vocabularies.items()]
        channels = [((self._channels(kept),), lost) for kept, lost in self.channels.items()]
        problems: list[ValueError] = []
        found = self._tried(allocate, [layers, tokens or [WHOLE], channels or [WHOLE]], (), problems)
        if not found:
            raise problems[-1] if problems else ValueError("No division of the budget is possible.")
        return found

    def _tried(
        self,
        allocate: Allocate,
        levels: Sequence[Sequence[Option]],
        chosen: tuple[Option, ...],
        problems: list[ValueError],
    ) -> list[Division]:
        """The divisions with what is chosen of the first kinds. Of each later kind ever more goes, until that alone
        takes what the budget asks for.

        Args:
            problems: gets the errors of those that do not reach it.
        """
        if not levels:
            wide = tuple(kept for option in chosen for kept in option[0])
            try:
                return [Division(allocate(wide), wide, tuple(lost for _, lost in chosen))]
            except ValueError as error:  # out of reach
                problems.append(error)
                return []
        found: list[Division] = []
        for option in levels[0]:
            here = self._tried(allocate, levels[1:], (*chosen, option), problems)
            found += here
            least = tuple(kept for part in (*chosen, option, *(level[0] for level in levels[1:])) for kept in part[0])
            if here and here[0].wide == least and self._is_alone(here[0]):
                break
        return found

    def _is_alone(self, division: Division) -> bool:
        """Whether the budget is reached without units of sites, but for heads that follow the stream."""
        following = follow_the_stream(self.anatomy, ["hidden"] if self.channels else [])
        return all(kept.is_identity or kept.where in following for kept in division.plan.sites)

    def _missed(self, gone: int) -> float:
        """The loss without so many layers, before any repair."""
        return float(np.interp(gone, [*self.without], [*self.without.values()])) if self.without else 0.0

    def best(
        self, model: PreTrainedModel, divisions: Sequence[Division], repair: Repair, tries: int
    ) -> tuple[Division, list[Division]]:
        """The division of least held-out loss of those that were tried, and all of them, in the order of `divisions`.
        The model is as it was afterwards."""
        if tries == 1:
            return (only := least_predicted(divisions)), [only]
        found: dict[int, Division] = {}
        predicted = np.array([each.predicted for each in divisions])
        for _ in tqdm(range(min(tries, len(divisions))), desc="divisions of the budget"):
            lost = {index: (each.measured or 0.0) - self.judge.dense for index, each in found.items()}
            index = next_to_try(predicted, lost)
            found[index] = self._measured(model, divisions[index], repair)
        return min(found.values(), key=lambda each: each.measured or 0.0), [found[index] for index in sorted(found)]

    def _measured(self, model: PreTrainedModel, division: Division, repair: Repair) -> Division:
        configs = [*all_configs(model), *token_configs(model)]
        modules = touched(model, self.anatomy, division.plan)
        with quiet(model), undone(modules, list({id(config): config for config in configs}.values())):
            execute_(model, self.anatomy, division.plan, repair)
            loss = self.judge(model, *self._translations(division.wide))
        return replace(division, measured=math.inf if math.isnan(loss) else loss)

    def _translations(self, wide: Sequence[Kept]) -> list[Translate]:
        tokens = next((kept for kept in wide if kept.where == ()), None)
        return [self.translate(tokens.kept)] if tokens is not None and self.translate is not None else []

    def _most(self) -> int:
        """Layers that may go, of the deepest stack."""
        return max((extent.of - max(1, len(extent.axis.fixed)) for extent in self._stacks()), default=0)

    def _stacks(self) -> list[Extent]:
        return [self.anatomy.extent(*where) for where in self.orders]

    def _layers(self, gone: int) -> list[Kept]:
        """The same share of each stack."""
        stacks = self._stacks()
        deepest = max((extent.of for extent in stacks), default=1)
        found = []
        for extent in stacks:
            count = min(round(gone * extent.of / deepest), extent.of - max(1, len(extent.axis.fixed)))
            dropped = {*self.orders[extent.where](count)} if count else set()
            kept = tuple(index for index in range(extent.of) if index not in dropped)
            found.append(Kept(extent.where, extent.axis.name, extent.of, kept))
        return found

    def _tokens(self, kept: Sequence[int]) -> list[Kept]:
        if not kept:
            return []
        extent = self.anatomy.extent()
        return [Kept((), extent.axis.name, extent.of, tuple(kept))]

    def _channels(self, kept: Sequence[int]) -> Kept:
        extent = self.anatomy.extent(*HIDDEN)
        return Kept(extent.where, extent.axis.name, extent.of, tuple(kept))


def _thinned(found: Sequence[Any], most: int) -> list[Any]:
    """At most so many, evenly, with both ends."""
    if len(found) <= most:
        return list(found)
    return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def _without(model: PreTrainedModel, missing: Sequence[tuple[Extent, Sequence[int]]], judge: Judge) -> float:
    if not missing:
        return judge(model)
    (extent, kept), *rest = missing
    with without_layers(model, extent, kept):
        return _without(model, rest, judge)
