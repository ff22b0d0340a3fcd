"""Rounds of cut, repair and training: where a run stands, and what its checkpoints remember of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy

from .config import PruningConfig
from .plan import PruningPlan

STATE_FILE = "pruning_state.json"
FORMAT = 1


@dataclass
class Run:
    """Where a run stands: what a checkpoint remembers beside the stock trainer's state."""

    config: PruningConfig
    dense_cost: dict[str, float]  # of the model handed in
    cuts: int = 0
    plan: PruningPlan | None = None  # all cuts so far, relative to the model handed in

    def save(self, directory: Path) -> None:
        plan = None if self.plan is None else self.plan.to_dict()
        state = {"format": FORMAT, "config": self.config.to_dict(), "dense_cost": self.dense_cost, "cuts": self.cuts}
        (directory / STATE_FILE).write_text(json.dumps({**state, "plan": plan}, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Run:
        found = json.loads((directory / STATE_FILE).read_text())
        plan = None if found["plan"] is None else PruningPlan.from_dict(found["plan"])
        return cls(PruningConfig.from_dict(found["config"]), found["dense_cost"], found["cuts"], plan)


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


def complete_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that a run can go on from, by step; half-written ones are left out."""
    found = [path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted((path for path in found if is_complete(path)), key=lambda path: int(path.name.split("-")[-1]))


def is_complete(directory: Path) -> bool:
    """The stock trainer writes its state last."""
    try:
        return all(json.loads((directory / name).read_text()) for name in (STATE_FILE, TRAINER_STATE_NAME))
    except (OSError, json.JSONDecodeError):
        return False


def trainer_state(directory: Path) -> TrainerState:
    return TrainerState.load_from_json(str(directory / TRAINER_STATE_NAME))
