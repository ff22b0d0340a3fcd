"""PruningTrainer: a transformers Trainer that cuts, repairs and trains in rounds. The order of calls, no maths.

A round is a run of the stock loop from a boundary: a checkpoint without optimizer states, which holds the weights after
the cut, the step, and the state of the random generators. To go on with the next round and to resume after a kill are
therefore the same thing; optimizer, warm-up and learning rate begin anew in each round.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer, TrainerState, set_seed

from ..decide.allocate import warn_if_far_below
from ..model.anatomy import check_model, describe
from .arguments import check_adapters, check_early, check_kind, check_output, check_own_teacher, check_student, opened
from ..model.batches import even_positions
from ..score.statistics import Ranks
from .callbacks import PruningCallback
from ..checkpoint.directory import clear
from ..config import DistillationConfig, PruningConfig
from ..decide.costs import dense_counts
from ..decide.costs import report as cost_report
from .distill import Distillation
from ..oneshot import PruneResult, analyze, apply
from ..plan import PruningPlan
from ..report.card import DENSE
from .resume import trainer_state
from .rounds import Round, RoundCallback, Run
from .saving import SavingMixin, cut_by
from ..schedules import shares, targets

CALIBRATION_BATCH = 32  # examples at most


class PruningMixin(SavingMixin):
    """What `PruningTrainer` adds to a Trainer; mix it into another: `class T(PruningMixin, SFTTrainer)`.

    Args (besides the Trainer's):
        pruning: how much, what, by which criterion, and in how many rounds. None: train as the stock Trainer does.
        distillation: learn from a teacher, too.
        teacher: the teacher; default: what `distillation.teacher` names, else this model as it was before the cut.
        peft_config: train adapters on the pruned model.
        merge_adapters: merge them at the end of `train`, so that a plain model is saved.
        calibration_dataset: examples to score and repair with, in the form of `train_dataset`, which is the default.

    Raises:
        ValueError: a model or settings that cannot be pruned or taught; an `output_dir` that cannot be replaced as a
            whole, as a save does it. TypeError: something of another type. Nothing is changed before.
    """

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
        for name, value in (("pruning", pruning), ("distillation", distillation), ("peft_config", peft_config)):
            if value is not None:
                check_kind(name, value)
        model = args[0] if args else kwargs.get("model")
        if pruning is not None:
            check_student(model)
            check_output(args[1] if len(args) > 1 else kwargs.get("args"))
        check_own_teacher(model, teacher, distillation)
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
        self.results: list[PruneResult] = []  # of each cut in this process
        self._evaluated: dict[int | str, tuple[Any, dict[str, float]]] = {}
        self._best_step: int | None = None
        self.round: Round | None = None
        self._run: Run | None = None
        self._boundary: Path | None = None
        self._teacher = teacher
        self._distiller: Distillation | None = None
        self._seen: Any = {}
        self._scratch = Path()
        super().__init__(*args, **kwargs)
        self._check()
        self.add_callback(RoundCallback(self))

    # --- before training ---------------------------------------------------------------------------------------------

    def _check(self) -> None:
        asked = {
            "FSDP": self.args.fsdp or self.is_fsdp_enabled,
            "DeepSpeed": self.args.deepspeed or self.is_deepspeed_enabled,
        }
        name = next((name for name, is_asked in asked.items() if is_asked), None)
        if self.pruning is not None and name:
            raise ValueError(
                f"A model that {name} shards cannot be cut. Cut it with hf_prune.prune() first and train the result "
                f"with pruning=None, or use plain data parallelism (torchrun without {name})."
            )
        if self.pruning is not None and self.optimizer is not None:
            raise ValueError(
                "optimizers=(...) holds the weights as they are before the cut. Give optimizer_cls_and_kwargs=, or "
                "TrainingArguments(optim=...)."
            )
        if self.pruning is not None:
            self._check_cut()
        if self.distillation is not None and (self._teacher is not None or self.distillation.teacher):
            self._teach()

    def _check_cut(self) -> None:
        """What a cut, a rewind and adapters would stumble over."""
        model = self._plain()
        check_model(model)
        if any(isinstance(callback, PruningCallback) for callback in self.callback_handler.callbacks):
            raise ValueError("pruning= and a PruningCallback both cut the model. Give one of them.")
        if self.peft_config is not None and not hasattr(self.model, "merge_and_unload"):
            check_adapters(model, self.peft_config)
        if self.pruning.rewind_to is not None:
            check_early(model, self.pruning.rewind_to)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the stock `train`; `resume_from_checkpoint=True` with no complete checkpoint starts anew, with a warning.

        Raises:
            ValueError: the rounds do not fit into the steps; a checkpoint of another PruningConfig, of other data, or
                damaged; `keep` not reachable (see `hf_prune.prune`). All before training starts.
        """
        if self.pruning is not None:
            if self.args.should_save:
                clear(Path(str(self.args.output_dir)))  # of boundaries that a kill left in the middle
            resume_from_checkpoint = self._checkpoint(resume_from_checkpoint)
            if self._run is not None and self.model_init is None and not resume_from_checkpoint:
                warnings.warn(
                    f"train() again cuts the model, which it has cut, to {self.pruning.keep} of what it is now. To "
                    "train it as it is, make a trainer without pruning=; to cut the dense one anew, give model_init=.",
                    stacklevel=2,
                )
            self._run = self._boundary = self.round = None
            self.results = []
            self._evaluated = {when: found for when, found in self._evaluated.items() if when == DENSE}
            self._best_step = None
            if self.model_init is not None:
                self._distiller = None
        with tempfile.TemporaryDirectory() as scratch:
            self._scratch = Path(scratch)
            return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- rounds ------------------------------------------------------------------------------------------------------

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        self._teach()
        loop = super()._inner_training_loop
        if self.pruning is None:
            with self._watching():
                return loop(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.args.auto_find_batch_size and batch_size:
            self._train_batch_size = batch_size  # the steps follow from it
        boundary = Path(resume_from_checkpoint) if resume_from_checkpoint else self._boundary
        self.state = self._first_state() if boundary is None else trainer_state(boundary)
        steps = self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]
        self.state.train_batch_size = self._train_batch_size
        self.state.compute_steps(self.args, steps)
        ends = shares(steps, self.pruning.rounds, self.pruning.recovery)
        keeps = targets(self.pruning.schedule, self.pruning.keep, self.pruning.rounds)
        if self._run is None:
            self._release_()
            self._run = Run(self.pruning, self._cost(), data=self._known_data())
        run = self._run
        started, first_step, loss, output, begun = time.time(), self.state.global_step, 0.0, None, False
        for number, (keep, start, end) in enumerate(zip(keeps, [0, *ends], ends, strict=False)):
            now = self.round = Round(number, len(ends), start, end, keep, started, first_step, loss)
            set_seed(self.args.seed)  # resumed or not, in any round: the same calibration, the same order of data
            if run.cuts <= number:
                self._cut_(run, now)
                set_seed(self.args.seed)
                boundary = self._boundary = self._write_boundary(trial)
            elif self.state.global_step >= end and not now.is_last:
                continue  # resumed at the end of this round
            with self._watching(), self._quiet_begin(begun):
                output = loop(batch_size, args, str(boundary), trial, ignore_keys_for_eval)
            loss, begun = now.loss, True
            if self.state.global_step < end:  # a callback stopped the training
                self._say_what_remains(run, now)
                break
        return output

    def _first_state(self) -> TrainerState:
        return TrainerState(
            stateful_callbacks=self.state.stateful_callbacks,
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
        )

    @contextlib.contextmanager
    def _quiet_begin(self, begun: bool) -> Iterator[None]:
        """Let callbacks hear of one beginning, whatever the number of rounds."""
        handler: Any = self.callback_handler

        def again(args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_training_stop = False
            return control

        if begun:
            handler.on_train_begin = again
        try:
            yield
        finally:
            handler.__dict__.pop("on_train_begin", None)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the stock one, over the steps of this round: the learning rate is rewound for each (Renda et al. 2020)."""
        if self.round is not None:
            num_training_steps = self.round.end - self.round.start
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The best model is one of the last round: the others have other shapes."""
        if self.round is not None and not self.round.is_last:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        now = self.round
        if now is None:
            return super()._finalize_training(trial, num_train_samples, start_time)
        now.loss += self._total_loss_scalar
        if not now.is_last and self.state.global_step >= now.end:
            now.loss += self._tr_loss.item()
            return None
        self._total_loss_scalar, self._initial_global_step = now.loss, now.first_step
        output = super()._finalize_training(trial, num_train_samples, now.started)
        self.round = None
        if self.merge_adapters:
            self._release_()
        return output

    # --- the cut -----------------------------------------------------------------------------------------------------

    def _cost(self) -> dict[str, float]:
        anatomy = describe(self._plain())
        return cost_report(anatomy, dense_counts(anatomy), self.pruning.sequence_length)

    def _say_what_remains(self, run: Run, now: Round) -> None:
        if now.is_last or run.kept <= self.pruning.keep:
            return
        warnings.warn(
            f"The training was stopped in round {now.number + 1} of {now.of}, at step {self.state.global_step} of "
            f"{self.state.max_steps}: {run.kept:.3g} of the {self.pruning.metric} remains, where keep="
            f"{self.pruning.keep:.3g} was asked for. Train on (resume_from_checkpoint), or cut the rest with "
            f"prune(model, data, PruningConfig(keep={self.pruning.keep / run.kept:.3g})).",
            stacklevel=2,
        )

    def _cut_(self, run: Run, now: Round) -> None:
        """Cut and repair to the round's target."""
        self._release_()
        early = None
        if self.pruning.rewind_to is not None:  # opened before anything is cut
            early = opened(type(self.model), self.pruning.rewind_to, "rewind_to", dtype=self.model.dtype)
        config = replace(self.pruning, keep=min(1.0, now.keep / run.kept))
        ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        analysis = analyze(self.model, self._calibration_data(), config, ranks=ranks)
        plan = analysis.plan()
        self._agree(plan)
        if early is not None:
            analysis = replace(analysis, config=replace(analysis.config, repair="none"))
        result = apply(self.model, analysis, plan)
        run.plan = plan if run.plan is None else run.plan.compose(plan)
        run.cuts += 1
        run.kept = self._counted(run, now.keep)
        if early is not None:
            self._rewind_(early, run.plan)
        self._adapt_()
        self.results.append(result)
        self.log({"round": now.number + 1, "target": now.keep, "keep": run.kept})
        if not plan.is_identity:
            warn_if_far_below(run.kept, self.pruning)

    def _counted(self, run: Run, asked: float) -> float:
        """What is left, by now, of the cost of the model handed in; of a latency, what was asked for."""
        metric = f"{self.pruning.metric}_{self.pruning.scope}"
        return self._cost()[metric] / run.dense_cost[metric] if metric in run.dense_cost else asked

    def _calibration_data(self) -> list[Any]:
        """Batches of the calibration examples, collated as the trainer collates."""
        name = "train_dataset" if self.calibration_dataset is None else "calibration_dataset"
        data = getattr(self, name)
        collate = self._get_collator_with_removed_columns(self.data_collator, description="calibration")
        size = max(1, min(self.args.per_device_train_batch_size, CALIBRATION_BATCH))
        try:
            examples = self._calibration_examples(data)
            return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]
        except Exception as error:  # of any kind, from the user's data and collator
            raise ValueError(
                f"{name} cannot be read as examples and collated ({type(error).__name__}: {error}). It is a Dataset, a "
                f"list or an iterable of examples that the trainer's data_collator takes; got {type(data).__name__}."
            ) from error

    def _calibration_examples(self, data: Any) -> list[Any]:
        count = self.pruning.calibration_samples
        if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            return [data[i] for i in even_positions(len(data), count, self.pruning.calibration_seed)]
        return list(itertools.islice(iter(data), count))

    def _agree(self, plan: PruningPlan) -> None:
        plans = gather_object([plan.hash])
        if len(set(plans)) > 1:
            raise RuntimeError(
                f"The processes came to different plans ({plans}); they must see the same data and model."
            )

    def _rewind_(self, early: PreTrainedModel, plan: PruningPlan) -> None:
        """Weights of an early step of the dense training, cut by the same plan, in place of the trained ones."""
        cut_by(early, plan, self.pruning)
        self.model.load_state_dict(early.state_dict())


class PruningTrainer(PruningMixin, Trainer):
    """A transformers Trainer that makes its model smaller before it trains it, in one round or in several.

    The arguments are the Trainer's and those of `PruningMixin`.

    >>> trainer = PruningTrainer(model=model, args=args, train_dataset=rows, pruning=PruningConfig(keep=0.5))
    ... # doctest: +SKIP
    """


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    """The same for transformers' Seq2SeqTrainer."""
