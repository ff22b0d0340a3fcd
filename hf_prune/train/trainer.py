"""PruningTrainer: a transformers Trainer that cuts, repairs and trains in rounds. The order of calls, no maths.

A round is a run of the stock training loop from a boundary: a checkpoint without optimizer states, which holds the
weights after the cut, the step, and the states of the random generators. So going on with the next round and resuming
after a kill are the same thing, and optimizer, warm-up and learning rate begin anew in each round.
"""

from __future__ import annotations

import contextlib
import inspect
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerState, set_seed

from ..checkpoint.directory import clear
from ..checkpoint.history import PLAN_FILE, history_of
from ..config import DistillationConfig, PruningConfig
from ..oneshot import PruneResult
from ..score.statistics import Ranks
from .adapters import adapted, check_adapters, home_of, merged, plain
from .arguments import (
    calibration_batches,
    check_early,
    check_given,
    check_optimizer,
    check_student,
    check_unsharded,
)
from .callback import PruningCallback
from .card import stated
from .resume import checkpoint_for, known_by, step_of, trainer_state
from .rounds import Round, RoundCallback, Run, quiet_begin, rounds_of
from .saver import Saver
from .teacher import LOGITS, Teacher

CALIBRATION_BATCH = 32  # examples at most

if TYPE_CHECKING:
    Mixed = Trainer  # what the mixin may rely on
else:
    Mixed = object


class PruningMixin(Mixed):
    """What `PruningTrainer` adds to a Trainer; mix it into another: `class T(PruningMixin, SFTTrainer)`.

    Args (besides the Trainer's):
        pruning: how much, what, by which criterion, and in how many rounds. None: train as the stock Trainer does.
        distillation: learn from a teacher as well.
        teacher: the teacher; default: what `distillation.teacher` names, else this model as it was before the cut.
        peft_config: train adapters on the pruned model.
        merge_adapters: merge them at the end of `train`, so that a plain model is saved.
        calibration_dataset: examples to score and repair with, in the form of `train_dataset`, which is the default.

    Attributes:
        results: what each cut of the latest `train` came to, as `prune` returns it.

    Raises:
        ValueError: a model or settings that cannot be pruned or taught; an `output_dir` that cannot be replaced as a
            whole, which is how a save writes it. TypeError: an argument of another type. Nothing is changed before.
    """

    model: Any
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        pruning: PruningConfig | None = None,
        distillation: DistillationConfig | None = None,
        teacher: PreTrainedModel | None = None,
        peft_config: Any = None,
        merge_adapters: bool = True,
        calibration_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        named = dict(zip(("model", "args"), args, strict=False)) | kwargs
        check_given(named.get("model"), named.get("args"), pruning, distillation, teacher, peft_config)
        if "peft_config" in inspect.signature(super().__init__).parameters:
            kwargs["peft_config"] = peft_config
        elif peft_config is not None and pruning is None:
            raise ValueError(
                "peft_config= without pruning=: there is no pruned model to put adapters on. Put them on the model "
                "(peft.get_peft_model(model, peft_config)) and train that."
            )
        self.pruning: Any = pruning
        self.distillation: Any = distillation
        self.peft_config = peft_config
        self.merge_adapters = merge_adapters
        self.calibration_dataset = calibration_dataset
        self.results: list[PruneResult] = []
        self._run: Run | None = None
        self._teacher: Teacher | None = None
        self._given_teacher = teacher
        super().__init__(*args, **kwargs)
        self._saver = Saver(self.args, super()._save)
        self._check()
        self.add_callback(RoundCallback(lambda: self.round, self.callback_handler))

    def _check(self) -> None:
        """Raise for what a cut, a rewind, adapters or the teacher would stumble over."""
        if self.pruning is not None:
            fsdp, deepspeed = self.args.fsdp or self.is_fsdp_enabled, self.args.deepspeed or self.is_deepspeed_enabled
            check_unsharded({"FSDP": fsdp, "DeepSpeed": deepspeed})
            check_optimizer(self.optimizer)
            self._check_cut(self._plain())
        if self.distillation is not None and (self._given_teacher is not None or self.distillation.teacher):
            self._teach()

    def _check_cut(self, model: PreTrainedModel) -> None:
        check_student(model)
        if any(isinstance(callback, PruningCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("pruning= and a PruningCallback both cut the model. Give one of them.")
        if self.peft_config is not None and not hasattr(self.model, "merge_and_unload"):
            check_adapters(model, self.peft_config)
        if self.pruning.rewind_to is not None:
            check_early(model, self.pruning.rewind_to)

    # --- the model, and what is put on it ----------------------------------------------------------------------------

    def _unwrapped(self) -> Any:
        """The model without what accelerate and torch.compile wrap it in; adapters are on it still."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _plain(self) -> Any:
        """The transformers model inside whatever wraps it."""
        return plain(self._unwrapped())

    def _release_(self) -> None:
        """Leave the plain model, with its adapters merged, and nothing that was made for its earlier shapes."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = merged(model)
        self.optimizer = self.lr_scheduler = None

    def _adapt_(self) -> None:
        """Put adapters on the plain model, if there are to be some."""
        self.model = self.model_wrapped = adapted(self.model, self.peft_config)

    # --- a run and its rounds ----------------------------------------------------------------------------------------

    @property
    def round(self) -> Round | None:
        """The round that is being trained."""
        return self._run.round if self._run else None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock `train`; `resume_from_checkpoint=True` with no complete checkpoint starts anew, with a warning.

        Raises:
            ValueError: the rounds do not fit into the steps; a checkpoint of another PruningConfig, of other data, or
                damaged; `keep` not reachable (see `hf_prune.prune`). All before training starts.
        """
        if self.pruning is not None:
            resume_from_checkpoint = self._begin(resume_from_checkpoint)
        with self._saver.scratch():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _begin(self, resume_from_checkpoint: Any) -> str | None:
        """Forget the run before, and find the checkpoint to resume from."""
        output_dir = Path(str(self.args.output_dir))
        if self.args.should_save:
            clear(output_dir)  # of boundaries that a kill left half-written
        found = checkpoint_for(resume_from_checkpoint, output_dir, self.pruning, self._data())
        if self._run is not None and self._run.cuts and self.model_init is None and found is None:
            warnings.warn(
                f"train() again cuts the model, which it has cut, to {self.pruning.keep} of what it is now. To "
                "train it as it is, make a trainer without pruning=; to cut the dense one anew, give model_init=.",
                stacklevel=3,
            )
        self._run, self.results = None, []
        self._saver.forget()
        if self.model_init is not None:  # the teacher was made for another student
            self._teacher = None
        return None if found is None else str(found)

    def _data(self) -> dict[str, Any]:
        return {"train_dataset": self.train_dataset, "calibration_dataset": self.calibration_dataset}

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """The stock loop, once for each round."""
        self._teach()
        stock = super()._inner_training_loop

        def loop(start: str | None) -> Any:
            with self._watching():
                return stock(batch_size, args, start, trial, ignore_keys_for_eval)

        if self.pruning is None:
            return loop(resume_from_checkpoint)
        if self.args.auto_find_batch_size and batch_size:
            self._train_batch_size = batch_size  # the steps follow from it
        return self._in_rounds(loop, resume_from_checkpoint, trial)

    def _in_rounds(self, loop: Callable[[str], Any], resume_from_checkpoint: str | None, trial: Any) -> Any:
        latest = self._run.boundary if self._run else None  # called again, with smaller batches: memory ran out
        boundary = latest or (Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        rounds = rounds_of(self.pruning, self._restart(boundary))
        run = self._run = self._run or self._new_run()
        run.begin(self.state.global_step, time.time())
        output, begun = None, False
        for now in rounds:
            run.round = now
            set_seed(self.args.seed)  # resumed or not, in any round: the same calibration, the same order of data
            if run.cuts <= now.number:
                self._cut_(run, now)
                set_seed(self.args.seed)
                boundary = run.boundary = self._save_boundary(run, trial)
            elif self.state.global_step >= now.end and not now.is_last:
                continue  # resumed at the end of this round
            with quiet_begin(self.callback_handler) if begun else contextlib.nullcontext():
                output, begun = loop(str(boundary)), True
            if self.state.global_step < now.end:  # a callback stopped the training
                run.warn_if_unfinished(now, self.state)
                break
        return output

    def _restart(self, boundary: Path | None) -> int:
        """Set the stock trainer's state to that of a boundary, or to a new one; returns the steps of the run."""
        if boundary is None:
            processes = {name: getattr(self, name)() for name in ("is_local_process_zero", "is_world_process_zero")}
            self.state = TrainerState(stateful_callbacks=self.state.stateful_callbacks, **processes)
        else:
            self.state = trainer_state(boundary)
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, steps)
        return steps

    def _new_run(self) -> Run:
        self._release_()
        return Run.of(self.model, self.pruning, {name: known_by(rows) for name, rows in self._data().items()})

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock one, over the steps of this round: each rewinds the learning rate (Renda et al. 2020)."""
        if self.round is not None:
            num_training_steps = self.round.end - self.round.start
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best model is sought in the last round alone: before it, models have other shapes."""
        if self.round is not None and not self.round.is_last:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """What the stock trainer does after its loop is done once, after the last round, for the whole run."""
        run = self._run
        if run is None or run.round is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        run.loss += self._total_loss_scalar
        if not run.round.is_last and self.state.global_step >= run.round.end:
            run.loss += self._tr_loss.item()
            return None
        self._total_loss_scalar, self._initial_global_step = run.loss, run.first_step
        output = super()._finalize_training(trial, num_train_samples, run.started)
        run.round = None
        if self.merge_adapters:
            self._release_()
        return output

    # --- the cut -----------------------------------------------------------------------------------------------------

    def _cut_(self, run: Run, now: Round) -> None:
        """Cut and repair to the round's target."""
        self._release_()
        ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        self.results.append(run.cut_(self.model, self._calibration_batches(), now.keep, ranks))
        self._adapt_()
        self.log({"round": now.number + 1, "target": now.keep, "keep": run.kept})

    def _calibration_batches(self) -> list[Any]:
        """The calibration examples, collated as the trainer collates."""
        name = "train_dataset" if self.calibration_dataset is None else "calibration_dataset"
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        size = max(1, min(self.args.per_device_train_batch_size, CALIBRATION_BATCH))
        return calibration_batches(name, getattr(self, name), collate, size, self.pruning)

    # --- the teacher -------------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """Make the teacher ready; without one of its own, the model teaches as it is now."""
        if self.distillation is not None and self._teacher is None:
            self._teacher = Teacher.of(self._plain(), self._given_teacher, self.distillation, self.train_dataset)

    def _watching(self) -> contextlib.AbstractContextManager[None]:
        """Keep what the layers of the student give, where a teacher is to compare it."""
        return contextlib.nullcontext() if self._teacher is None else self._teacher.watching(self._plain())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task loss, and while training what the teacher adds, scaled alike for gradient accumulation."""
        inputs = dict(inputs)
        logits = inputs.pop(LOGITS, None)
        if self._teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        task, output = self._task_loss(model, inputs, num_items_in_batch)
        with self.accelerator.autocast():  # the stock trainer puts it around the student alone
            taught, rows, output = self._teacher.lesson(model, self._plain(), inputs, logits, output)
        total = task + self._part(rows, num_items_in_batch) * taught
        return (total, output) if return_outputs else total

    def _task_loss(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> tuple[Any, Any]:
        """The weighted task loss, and the output if it is sure to hold logits, else None."""
        weight: float = self.distillation.task_weight
        if not weight:
            return 0.0, None
        loss_of: Any = super().compute_loss
        is_stock = loss_of.__func__ is Trainer.compute_loss  # others may give no logits
        found = loss_of(model, dict(inputs), is_stock, num_items_in_batch)
        loss, output = found if is_stock else (found, None)
        return weight * loss, output

    def _part(self, rows: int, num_items_in_batch: Any) -> Any:
        """The share that a batch of so many labelled tokens has in the mean over the accumulated batch."""
        if num_items_in_batch is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return 1.0  # the stock training step divides by the number of batches
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return rows * ranks / num_items_in_batch

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if LOGITS not in columns:
            columns.append(LOGITS)

    # --- saving and restoring ----------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Checkpoints as the stock trainer saves them; anything else is reloaded and compared before it is there."""
        if self.pruning is None:
            return super()._save(output_dir, state_dict)
        directory = Path(output_dir or str(self.args.output_dir))
        return self._saver.save(self._unwrapped(), directory, state_dict, self._run, self.state)

    def _save_boundary(self, run: Run, trial: Any) -> Path:
        run_dir = Path(self._get_output_dir(trial))
        return self._saver.save_boundary(self._unwrapped(), run_dir, run, self.state, self._save_rng_state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """In a run with pruning the model as it was handed in is cut as the checkpoint's was, and gets its weights."""
        if self.pruning is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._teach()  # by the model as it was handed in
        self._release_()
        directory = Path(resume_from_checkpoint)
        self._run = self._saver.restore_(self.model, directory)
        if home_of(directory) != directory:
            self._adapt_()
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        return None

    def _load_best_model(self) -> None:
        if self.pruning is not None:
            best = Path(str(self.state.best_model_checkpoint))
            if isinstance(self.model, PreTrainedModel):
                return self._saver.restore_best_(self.model, best)
            self._saver.best_step = step_of(best)
        return super()._load_best_model()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """As the stock `evaluate`. The card shows what it finds before the cut, and of the weights that are saved."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.pruning is not None:
            # after a cut the model is prepared anew; the stock search would add up the time of it and the metrics
            metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
            step = None if history_of(self._plain()) is None else self._saver.step_of_weights(self.state)
            rows = self.eval_dataset if eval_dataset is None else eval_dataset
            self._saver.card.add(step, rows, metrics, metric_key_prefix)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of a pruned model (see `hf_prune.report.card`) in output_dir; else the stock one."""
        stock, directory = super().create_model_card, Path(str(self.args.output_dir))
        if self.pruning is None or not (directory / PLAN_FILE).is_file():
            stock(*args, **kwargs)
        elif self.is_world_process_zero():
            given = stated(stock, args, kwargs, getattr(self, "hub_model_id", None))
            self._saver.card.write(directory, self._saver.step_of_weights(self.state), **given)


class PruningTrainer(PruningMixin, Trainer):
    """A transformers Trainer that makes its model smaller before it trains it, in one round or in several.

    The arguments are the Trainer's and those of `PruningMixin`.

    >>> trainer = PruningTrainer(model=model, args=args, train_dataset=rows, pruning=PruningConfig(keep=0.5))
    ... # doctest: +SKIP
    """


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    """The same for transformers' Seq2SeqTrainer."""
