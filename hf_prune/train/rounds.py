"""Rounds of cut, repair and training: where a run stands, and what its checkpoints remember of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..config import PruningConfig
from ..files import read_json, write_text
from ..plan import PruningPlan

STATE_FILE = "pruning_state.json"
FORMAT = 1


@dataclass
class Run:
    """Where a run stands: what a checkpoint remembers beside the stock trainer's state."""

    config: PruningConfig
    dense_cost: dict[str, float]  # of the model handed in
    cuts: int = 0
    kept: float = 1.0  # of that cost, after these cuts
    plan: PruningPlan | None = None  # all cuts so far, relative to the model handed in
    data: Mapping[str, Any] | None = None  # by what they are known again, see `resume.known_by`

    def save(self, directory: Path) -> None:
        plan = None if self.plan is None else self.plan.to_dict()
        state = {**vars(self), "format": FORMAT, "config": self.config.to_dict(), "plan": plan}
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


@dataclass
class Round:
    """One round of a run, and what the rounds before it leave to be reported at the end."""

    number: int
    of: int
    start: int  # step
    end: int
    keep: float  # of the model handed in
    started: float = 0.0  # the run, not the round
    first_step: int = 0
    loss: float = 0.0  # summed over the steps of earlier rounds

    @property
    def is_last(self) -> bool:
        return self.number == self.of - 1


class RoundCallback(TrainerCallback):
    """Ends a round at its step, and names the round beside the stock progress bar."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.trainer.round
        for callback in self.trainer.callback_handler.callbacks if now else ():
            if getattr(callback, "training_bar", None) is not None:
                callback.training_bar.set_description(f"round {now.number + 1}/{now.of}, keep {now.keep:.3g}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.round and state.global_step >= self.trainer.round.end:
            control.should_training_stop = True
            control.should_log |= args.logging_strategy != IntervalStrategy.NO
