"""Rounds of cut, repair and training: where a run stands, and what its checkpoints remember of it."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainerCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy

from ..config import PruningConfig
from ..decide.allocate import warn_if_far_below
from ..decide.costs import report as cost_report
from ..files import read_json, write_text
from ..model.anatomy import describe
from ..oneshot import Analysis, PruneResult, analyze
from ..plan import PruningPlan
from ..schedules import shares, targets
from ..score.statistics import Ranks
from .arguments import opened_like

STATE_FILE = "pruning_state.json"
FORMAT = 1


@dataclass(frozen=True)
class Round:
    """One round of a run."""

    number: int
    of: int
    start: int  # step
    end: int
    keep: float  # of the model that was handed in

    @property
    def is_last(self) -> bool:
        return self.number == self.of - 1


def rounds_of(config: PruningConfig, steps: int) -> list[Round]:
    """The rounds of a run of so many steps.

    Raises:
        ValueError: a round would have no step.
    """
    ends = shares(steps, config.rounds, config.recovery)
    keeps = targets(config.schedule, config.keep, config.rounds)
    parts = zip([0, *ends], ends, keeps, strict=False)
    return [Round(number, len(ends), start, end, keep) for number, (start, end, keep) in enumerate(parts)]


@dataclass
class Run:
    """Where a run stands. The first six fields are in its checkpoints, beside the stock trainer's state."""

    config: PruningConfig
    dense_cost: dict[str, float]  # of the model that was handed in
    cuts: int = 0
    kept: float = 1.0  # of that cost, after these cuts
    plan: PruningPlan | None = None  # all cuts so far, relative to the model that was handed in
    data: Mapping[str, Any] | None = None  # a fingerprint of each data set, see `resume.known_by`

    round: Round | None = None  # the one that is being trained
    boundary: Path | None = None  # the checkpoint that was written after the latest cut
    first_step: int = 0  # of this process
    started: float = 0.0  # seconds since the epoch
    loss: float = 0.0  # summed over the steps of the rounds before this one

    @classmethod
    def of(cls, model: PreTrainedModel, config: PruningConfig, data: Mapping[str, Any]) -> Run:
        """A run that begins with this model."""
        return cls(config, _cost(model, config), data=data)

    def save(self, directory: Path) -> None:
        state = {
            "config": self.config.to_dict(),
            "dense_cost": self.dense_cost,
            "cuts": self.cuts,
            "kept": self.kept,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "data": self.data,
            "format": FORMAT,
        }
        write_text(directory / STATE_FILE, json.dumps(state, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Run:
        """What `save` wrote.

        Raises:
            FileNotFoundError: nothing is there. ValueError: something else is.
        """
        path = directory / STATE_FILE
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"{path.name} has format {found.get('format')!r}; this hf_prune knows {FORMAT}.")
        try:
            plan = None if found["plan"] is None else PruningPlan.from_dict(found["plan"])
            cost = {name: float(value) for name, value in found["dense_cost"].items()}
            config, kept = PruningConfig.from_dict(found["config"]), float(found["kept"])
            return cls(config, cost, int(found["cuts"]), kept, plan, found["data"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path.name} is damaged ({error!r}).") from error

    # --- cuts --------------------------------------------------------------------------------------------------------

    def cut_(self, model: PreTrainedModel, batches: Sequence[Any], keep: float, ranks: Ranks) -> PruneResult:
        """Cut and repair a model in place, and count what is left of it.

        Args:
            batches: calibration data.
            keep: the target, of the model that the run began with.

        Raises:
            ValueError: see `hf_prune.prune`. RuntimeError: the processes came to different plans.
        """
        config = replace(self.config, keep=min(1.0, keep / self.kept))
        early = None
        if config.rewind_to is not None:  # opened before anything is cut
            early = opened_like(model, config.rewind_to, "rewind_to")
        analysis = analyze(model, batches, config, ranks=ranks)
        plan, tried = analysis.decide(model)
        _check_agreed(plan)
        if early is not None:  # its weights replace those that a repair would make
            analysis = replace(analysis, config=replace(analysis.config, repair="none"))
        result = analysis.cut_(model, plan=plan)
        result.report["divisions"] = tried  # unknown to a cut by a given plan
        self._count(model, plan, keep)
        if early is not None:
            self._rewind_(model, early)
        if not plan.is_identity:
            warn_if_far_below(self.kept, self.config)
        return result

    def _rewind_(self, model: PreTrainedModel, early: PreTrainedModel) -> None:
        """Replace the weights by those of an early step of the dense training, cut by the same plan."""
        if self.plan is not None:
            cut_by_(early, self.plan, self.config)
        model.load_state_dict(early.state_dict())

    def _count(self, model: PreTrainedModel, plan: PruningPlan, asked: float) -> None:
        self.plan = plan if self.plan is None else self.plan.compose(plan)
        self.cuts += 1
        metric = f"{self.config.metric}_{self.config.scope}"
        known = metric in self.dense_cost  # a latency is not counted: take it for what was asked for
        self.kept = _cost(model, self.config)[metric] / self.dense_cost[metric] if known else asked

    # --- training ----------------------------------------------------------------------------------------------------

    def begin(self, step: int, now: float) -> None:
        """Note where this process begins to train, and when."""
        self.first_step, self.started, self.loss = step, now, 0.0

    def warn_if_unfinished(self, now: Round, state: TrainerState) -> None:
        """Warn where the training was stopped in a round after which more was to be cut."""
        keep = self.config.keep
        if now.is_last or self.kept <= keep:
            return
        warnings.warn(
            f"The training was stopped in round {now.number + 1} of {now.of}, at step {state.global_step} of "
            f"{state.max_steps}: {self.kept:.3g} of the {self.config.metric} remains, where keep={keep:.3g} was asked "
            f"for. Train on (resume_from_checkpoint), or cut the rest with "
            f"prune(model, data, PruningConfig(keep={keep / self.kept:.3g})).",
            stacklevel=2,
        )


def cut_by_(model: PreTrainedModel, plan: PruningPlan, config: PruningConfig) -> None:
    """Cut a model to the sizes of a plan, without data: its weights are given, or will be loaded."""
    analysis = Analysis(describe(model), replace(config, repair="none"), [], 1)
    analysis.cut_(model, plan=replace(plan, config={}))


def _cost(model: PreTrainedModel, config: PruningConfig) -> dict[str, float]:
    anatomy = describe(model)
    return cost_report(anatomy, anatomy.sizes, config.sequence_length)


def _check_agreed(plan: PruningPlan) -> None:
    plans = gather_object([plan.hash])
    if len(set(plans)) > 1:
        raise RuntimeError(f"The processes came to different plans ({plans}); they must see the same data and model.")


# --- what callbacks see ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet_begin(handler: Any) -> Iterator[None]:
    """Keep `on_train_begin` from a trainer's callbacks: in a run of several rounds they hear of one beginning."""

    def again(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = False
        return control

    handler.on_train_begin = again
    try:
        yield
    finally:
        del handler.on_train_begin


class RoundCallback(TrainerCallback):
    """Ends a round at its last step, and names the round beside the stock progress bar.

    Args:
        now: gives the round that is being trained, None outside of one.
        handler: the trainer's `callback_handler`, whose callbacks may have a progress bar.
    """

    def __init__(self, now: Callable[[], Round | None], handler: Any) -> None:
        self.now, self.handler = now, handler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, bars = self.now(), [getattr(callback, "training_bar", None) for callback in self.handler.callbacks]
        for bar in bars:
            if now and bar is not None:
                bar.set_description(f"round {now.number + 1}/{now.of}, keep {now.keep:.3g}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.now()
        if now and state.global_step >= now.end:
            control.should_training_stop = True
            control.should_log |= args.logging_strategy != IntervalStrategy.NO
