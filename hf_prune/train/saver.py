"""What a run writes and reads back: checkpoints to resume from, and models that are proven to reload."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.utils import wait_for_everyone
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..checkpoint.directory import beside, carry, resolved, written
from ..checkpoint.history import PLAN_FILE, History, history_of
from ..checkpoint.layout import KEY
from ..checkpoint.proof import is_loaded, prove
from ..files import HALF_WRITTEN
from .adapters import home_of, opener_of, plain, save_base
from .arguments import check_shapes, opened_like
from .card import Card
from .resume import is_named_checkpoint, step_of
from .rounds import Run, cut_by_


class Saver:
    """Saves the model of a run, and restores it.

    Args:
        args: the trainer's.
        stock: `_save(directory, state_dict)` of the stock trainer, which writes the trainer's model as it is.
    """

    def __init__(self, args: TrainingArguments, stock: Callable[[str, Any], None]) -> None:
        self.args = args
        self.card = Card()
        self.best_step: int | None = None  # of the weights, where they are not the latest
        self._stock = stock
        self._scratch = Path()

    @contextlib.contextmanager
    def scratch(self) -> Iterator[None]:
        """A run's place for what is gone after it."""
        with tempfile.TemporaryDirectory() as scratch:
            self._scratch = Path(scratch)
            yield

    def forget(self) -> None:
        """Forget the run before: the best step, and what was found after its cut."""
        self.best_step = None
        self.card.forget()

    def step_of_weights(self, state: TrainerState) -> int:
        """The step that the weights in memory are of."""
        return state.global_step if self.best_step is None else self.best_step

    # --- writing -----------------------------------------------------------------------------------------------------

    def save(self, model: Any, directory: Path, state_dict: Any, run: Run | None, state: TrainerState) -> None:
        """Save a checkpoint as the stock trainer does; or a model, which replaces `directory` once it is proven.

        Args:
            model: what is being trained, with adapters if there are any.
            run: where the run stands, for a checkpoint.

        Raises:
            RuntimeError: the model does not reload as it is in memory; then `directory` is as it was.
        """
        if is_named_checkpoint(directory):
            if self.args.should_save:
                _forget_state(directory)
            self._write(model, directory, state_dict, run)
        elif self.args.should_save:
            directory = resolved(directory)
            with beside(directory) as new:
                self._write(model, new, state_dict)
                prove(model, new, opener_of(model))
                carry(directory, new, _is_left)
            if (directory / PLAN_FILE).is_file():
                self.card.write(directory, self.step_of_weights(state))

    def save_boundary(
        self, model: Any, run_dir: Path, run: Run, state: TrainerState, save_rng: Callable[[str], None]
    ) -> Path:
        """Write a checkpoint of a model that was just cut, without optimizer states: whole, or not at all.

        Where a run keeps no checkpoints this one holds no weights, and is gone after the run. All processes call it.

        Args:
            save_rng: writes the states of this process's random generators into a directory.
        """
        lasting = self.args.save_strategy != SaveStrategy.NO
        target = resolved((run_dir if lasting else self._scratch) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        is_writer = self.args.should_save or not lasting
        with beside(target) if is_writer else contextlib.nullcontext():
            wait_for_everyone()
            save_rng(str(written(target)))
            if lasting:
                self._write(model, written(target), run=run)
            wait_for_everyone()
            if is_writer:
                state.save_to_json(str(written(target) / TRAINER_STATE_NAME))
        wait_for_everyone()
        return target

    def _write(self, model: Any, directory: Path, state_dict: Any = None, run: Run | None = None) -> None:
        """What a save consists of: weights, plan and reports, and of a checkpoint where its run stands."""
        self._stock(str(directory), state_dict)
        if not self.args.should_save:
            return
        home = save_base(model, directory)
        history = history_of(plain(model))
        if history is not None:
            history.save(home)
        if run is not None:
            run.save(directory)

    # --- reading -----------------------------------------------------------------------------------------------------

    def restore_(self, model: PreTrainedModel, directory: Path) -> Run:
        """Cut a model as that of a checkpoint was cut, give it the weights, and return where the run stands.

        Raises:
            ValueError: the checkpoint is of another model.
        """
        home, run = home_of(directory), Run.load(directory)
        saved = opened_like(model, home, "The checkpoint")
        if run.plan is not None:
            cut_by_(model, run.plan, run.config)
        _put_weights_(model, saved)
        if run.plan is not None:
            model._hf_prune = History.load(home)  # type: ignore[assignment]
        return run

    def restore_best_(self, model: PreTrainedModel, directory: Path) -> None:
        """Put the weights of the best checkpoint into a model; where that fails it keeps its own, with a warning."""
        try:
            _put_weights_(model, opened_like(model, directory, "The checkpoint"))
        except ValueError as error:  # no reason to lose the run: the latest weights are there
            warnings.warn(f"The best model is not loaded, the latest one stays: {error}", stacklevel=3)
        else:
            self.best_step = step_of(directory)


def _put_weights_(model: PreTrainedModel, saved: PreTrainedModel) -> None:
    """Give a model the weights of a saved one, and what its config says of the pruning.

    Raises:
        ValueError: the saved weights have other shapes.
    """
    check_shapes(model, saved, f"The checkpoint {saved.config._name_or_path}")
    model.load_state_dict(saved.state_dict())
    if saved.config.__dict__.get(KEY):
        setattr(model.config, KEY, saved.config.__dict__[KEY])


def _forget_state(directory: Path) -> None:
    """Remove the trainer's state that an earlier run left: until it has its own, the checkpoint is incomplete."""
    for path in (directory / TRAINER_STATE_NAME, *directory.glob(HALF_WRITTEN)):
        path.unlink(missing_ok=True)


def _is_left(name: str) -> bool:
    """Whether a save leaves behind what an earlier one wrote by this name. Checkpoints, logs and notes it keeps."""
    return is_loaded(name) or fnmatch(name, HALF_WRITTEN)
