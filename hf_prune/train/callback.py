"""PruningCallback: prune in a Trainer that is not ours, by masks while it trains and one cut at the end.

Shapes: B examples, T tokens, U units of a site, K = U*w columns of a consumer's input.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from ..config import PruningConfig
from ..decide.allocate import allocate
from ..decide.units import choose_units, considered, default_align, unit_of
from ..model.anatomy import Anatomy, describe
from ..model.offload import check_in_memory
from ..model.sites import consumer
from ..oneshot import Analysis, PruneResult
from ..plan import PruningPlan, Where
from ..schedules import SCHEDULES
from ..score.criteria import CRITERIA
from ..score.statistics import Ranks, gate_hook
from .arguments import check_kind, check_units

DECAY = 0.9  # of the running mean of scores, at each update


class PruningCallback(TrainerCallback):
    """Masks a growing part of the model while it trains, and removes that part when the training ends.

    The scores are the Fisher information of a gate on every unit, from the gradients of the ordinary training steps.
    Every so many steps a plan for the schedule's target becomes a mask. A masked unit scores 0 in later plans, which
    therefore remove it again. The cut needs no repair, since the model was trained without what it removes.

    Args:
        pruning: what to remove and how much; its `schedule` says how fast, `criterion` is fisher.
        begin, end: the fractions of all steps between which the masks grow.
        every: steps from one mask to the next.

    Attributes:
        result: what the cut came to, as `prune` returns it; None before.

    Raises:
        ValueError: a schedule that does not reach `keep` before the training ends, or a criterion other than fisher;
            all before the first step. TypeError: `pruning` is no PruningConfig.
    """

    def __init__(self, pruning: PruningConfig, begin: float = 0.1, end: float = 0.7, every: int = 20) -> None:
        check_kind("pruning", pruning)
        if pruning.criterion not in (None, "fisher"):
            raise ValueError(
                f"criterion={pruning.criterion!r}: PruningCallback scores by the gradients of training steps, which is "
                "'fisher'. Use PruningTrainer or prune() for others."
            )
        check_units(
            pruning,
            ("layers", "tokens", "hidden"),
            "PruningCallback masks heads and neurons. Use PruningTrainer for layers and hidden, prune() for tokens",
        )
        if pruning.metric == "latency":
            raise ValueError("metric='latency': PruningCallback counts 'macs' or 'params'; use PruningTrainer.")
        are_numbers = all(type(value) in (int, float) for value in (begin, end)) and type(every) is int
        if not are_numbers or not 0 <= begin < end <= 1 or every < 1:
            raise ValueError(
                f"begin={begin!r}, end={end!r}, every={every!r}: 0 <= begin < end <= 1 and a whole number "
                "every >= 1 are needed."
            )
        self.pruning = replace(pruning, criterion="fisher")
        self.begin, self.end, self.every = begin, end, every
        self.result: PruneResult | None = None
        self.plan: PruningPlan | None = None
        self._handles: list[Any] = []

    # --- events ------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        first, last = (round(state.max_steps * share) for share in (self.begin, self.end))
        if not 0 <= first < last <= state.max_steps or last == 0:
            raise ValueError(
                f"begin={self.begin}, end={self.end} of {state.max_steps} steps never reach keep={self.pruning.keep}: "
                "there is no step between. Train longer, or widen them."
            )
        self._remove()
        self._first, self._last = first, last
        self._ranks = Ranks(args.process_index, args.world_size)
        self._start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step == self._last or (self._first < step < self._last and (step - self._first) % self.every == 0):
            progress = (step - self._first) / (self._last - self._first)
            self._update(SCHEDULES[self.pruning.schedule](self.pruning.keep, progress))

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.finalize(model)

    def finalize(self, model: Any) -> PruneResult | None:
        """Remove the gates and cut what they mask. This happens by itself when the training ends.

        Returns:
            The result of the cut; None where nothing was masked.
        """
        self._remove()
        if self.plan is None:
            return self.result
        plan, self.plan = self.plan, None
        if plan.cost["keep"] > self.pruning.keep:
            warnings.warn(
                f"The training ended before the schedule: {plan.cost['keep']:.3g} remains, of keep={self.pruning.keep} "
                "asked for. Cut the rest with prune().",
                stacklevel=2,
            )
        scores = {key: score.cpu() for key, score in self._scores.items()}
        analysis = Analysis(self._anatomy, replace(self.pruning, repair="none"), [], self._align, scores=scores)
        self.result = analysis.cut_(model, plan=plan)
        return self.result

    # --- gates -------------------------------------------------------------------------------------------------------

    def _start(self, model: Any) -> None:
        anatomy: Anatomy = describe(model)
        check_in_memory(model, "Training changes the weights themselves")
        if any(site.routed for site in anatomy.sites):
            raise ValueError(
                f"PruningCallback masks what one matrix reads, and this {anatomy.model_type} has experts. "
                "PruningTrainer cuts them."
            )
        units = choose_units(anatomy, self.pruning)
        anatomy = considered(anatomy, units)
        self._anatomy, self._align = anatomy, self.pruning.align or default_align(anatomy, model.device.type)
        sizes = {site.key: site.sizes[unit_of(site, units)] for site in anatomy.sites}
        allocate(
            anatomy, {key: torch.ones(size) for key, size in sizes.items()}, self.pruning, self._align
        )  # may raise
        self._scores = {key: torch.zeros(size, device=model.device) for key, size in sizes.items()}
        self._fresh = {key: torch.zeros(size, device=model.device) for key, size in sizes.items()}
        self._masks = {key: torch.ones(size, device=model.device) for key, size in sizes.items()}
        self._examples, self._batch = 0, 1
        self._handles = [model.register_forward_pre_hook(self._count, with_kwargs=True)]
        for site in anatomy.sites:
            self._handles.append(consumer(model, site).register_forward_pre_hook(self._gate(site.key)))

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self._batch = len(given)
        self._examples += len(given) if module.training else 0

    def _gate(self, key: Where) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            gate = self._masks[key].expand(self._batch, -1)
            if module.training and torch.is_grad_enabled():
                gate = gate.clone().requires_grad_()
                gate.register_hook(lambda gradient: self._add(key, gradient))
            return gate_hook(gate)(module, args)

        return hook

    def _add(self, key: Where, gradient: torch.Tensor) -> None:
        """Add the squared gradient of each example. `gradient`, [B, U], is of a mean over B: B times too small."""
        self._fresh[key] += (gradient * len(gradient)).square().sum(0)

    def _update(self, keep: float) -> None:
        """Fold the gradients since the last update into the scores, and mask by a plan for `keep`."""
        examples = torch.tensor(float(self._examples), device=next(iter(self._fresh.values())).device)
        self._ranks.sum_(examples, *self._fresh.values())
        for key, total in self._fresh.items():
            self._scores[key].mul_(DECAY).add_(total / examples.clamp_min(1), alpha=1 - DECAY)
            total.zero_()
        self._examples = 0
        # what is masked scores 0, so that every later plan removes it again
        scores = {key: (score * self._masks[key]).cpu() for key, score in self._scores.items()}
        across = CRITERIA["fisher"].across
        self.plan = allocate(self._anatomy, scores, replace(self.pruning, keep=keep), self._align, across)
        for kept in self.plan.sites:
            mask = torch.zeros_like(self._masks[kept.where])
            mask[list(kept.kept)] = 1
            self._masks[kept.where] = mask
