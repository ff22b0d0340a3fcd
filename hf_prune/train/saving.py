"""What PruningTrainer writes and reads: checkpoints to resume from, and models that are proven to reload."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import warnings
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..model.anatomy import describe
from .arguments import check_shapes, opened
from ..checkpoint.directory import beside, carry, resolved, written
from ..checkpoint.history import PLAN_FILE, Record, record_of
from ..checkpoint.layout import KEY
from ..checkpoint.proof import BASE, is_loaded, prove
from ..config import PruningConfig
from ..files import HALF_WRITTEN
from ..oneshot import Analysis, apply
from ..plan import PruningPlan
from ..report.card import DENSE, PRUNED, write_card, write_evaluation
from .resume import apart, checkpoints, damage, is_named_checkpoint, known_by, step_of
from .rounds import STATE_FILE, Run
from .teaching import TeachingMixin

FILE_FORMATS = ("csv", "json", "parquet", "arrow", "text", "pandas", "generator")  # which datasets takes for a name
CARD_FIELDS = {  # ours -> transformers' name of what `push_to_hub` may say
    "license": "license",
    "language": "language",
    "tags": "tags",
    "base_model": "finetuned_from",
    "datasets": "dataset_tags",
}
NOT_QUALITY = ("_runtime", "_per_second", "_time", "epoch")  # of what `evaluate` reports


class SavingMixin(TeachingMixin):
    """Checkpoints with the plan beside the weights, saves that are proven, and the card that comes with them."""

    pruning: Any
    peft_config: Any
    calibration_dataset: Any
    _run: Run | None
    _scratch: Path
    _evaluated: dict[int | str, tuple[Any, dict[str, float]]]  # at "dense" and at each step: the data, what was found
    _best_step: int | None  # of the weights, where they are not the latest

    def _release_(self) -> None:
        """Leave the plain model, adapters merged, and nothing that was made for its earlier shapes."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload().requires_grad_(True)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None

    def _adapt_(self) -> None:
        """Put adapters on the plain model, if there are to be some."""
        if self.peft_config is not None:
            from peft import get_peft_model

            self.model = self.model_wrapped = get_peft_model(self.model, copy.deepcopy(self.peft_config))

    def _checkpoint(self, given: Any) -> str | None:
        """The directory to resume from."""
        if given is None or given is False:
            return None
        if not isinstance(given, bool | str | os.PathLike):
            raise TypeError(f"resume_from_checkpoint takes a directory or True, got {given!r:.60}.")
        directory = self._latest_checkpoint() if given is True else Path(str(given))
        if directory is None:
            return None
        wrong = damage(directory)
        if wrong:
            raise ValueError(
                f"{directory} is no complete checkpoint of a run with pruning: {wrong}. Give another, or "
                "resume_from_checkpoint=True for the latest that is complete."
            )
        self._check_same(directory, Run.load(directory))
        if not list(directory.glob("rng_state*.pth")):
            warnings.warn(
                f"{directory} has no rng_state: dropout is drawn anew, and the run will not end as it would have.",
                stacklevel=3,
            )
        return str(directory)

    def _latest_checkpoint(self) -> Path | None:
        """The latest one that a run can go on from; newer ones that are not whole are named in a warning."""
        home = Path(str(self.args.output_dir))
        wrong = {path: damage(path) for path in checkpoints(home)}
        found = max((path for path in wrong if not wrong[path]), key=step_of, default=None)
        passed = [path for path in wrong if wrong[path] and (found is None or step_of(path) > step_of(found))]
        if passed:
            said = "; ".join(f"{path.name} ({wrong[path]})" for path in passed)
            warnings.warn(f"In {home}, not whole and passed over: {said}.", stacklevel=4)
        if found is None:
            warnings.warn(f"No complete checkpoint in {home}: training starts anew.", stacklevel=4)
        return found

    def _check_same(self, directory: Path, run: Run) -> None:
        """Raise ValueError unless a checkpoint's run was asked for the same, of the same data."""
        theirs, ours = run.config.to_dict(), self.pruning.to_dict()
        changed = {key: (theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]}
        if changed:
            raise ValueError(
                f"{directory} was made with another PruningConfig; (there, here): {changed}. Resume with the same, or "
                "train into another output_dir."
            )
        here = self._known_data()
        for name, there in (run.data or {}).items():
            wrong = apart(there, here.get(name))
            if wrong:
                raise ValueError(
                    f"{directory} was made with another {name}: {wrong}. Resume with the same, or train into another "
                    f'output_dir. (If it is the same, take "data" out of the checkpoint\'s {STATE_FILE}.)'
                )

    def _known_data(self) -> dict[str, Any]:
        data = {"train_dataset": self.train_dataset, "calibration_dataset": self.calibration_dataset}
        return {name: known_by(rows) for name, rows in data.items()}

    def _write_boundary(self, trial: Any) -> Path:
        """A checkpoint at this step, with the model just cut and without optimizer states. Whole or not at all.

        Where no checkpoints are wanted it holds no weights, and is gone after the run.
        """
        lasting = self.args.save_strategy != SaveStrategy.NO
        directory = Path(self._get_output_dir(trial)) if lasting else self._scratch
        target = resolved(directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        is_writer = self.args.should_save or not lasting
        with beside(target) if is_writer else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self._save_rng_state(str(written(target)))
            if lasting:
                self._write(written(target), is_checkpoint=True)
            self.accelerator.wait_for_everyone()
            if is_writer:
                self.state.save_to_json(str(written(target) / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        return target

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Checkpoints as the stock trainer saves them; anything else is reloaded and compared before it is there."""
        directory = Path(output_dir or str(self.args.output_dir))
        if self.pruning is None:
            super()._save(output_dir, state_dict)
        elif is_named_checkpoint(directory):
            if self.args.should_save:  # the state of an earlier run: this one's comes last
                for path in (directory / TRAINER_STATE_NAME, *directory.glob(HALF_WRITTEN)):
                    path.unlink(missing_ok=True)
            self._write(directory, state_dict, is_checkpoint=True)
        elif self.args.should_save:
            directory = resolved(directory)
            with beside(directory) as new:
                self._write(new, state_dict)
                model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
                opener: Any = type(model) if isinstance(model, PreTrainedModel) else _Adapted(self._plain())
                prove(model, new, opener)
                carry(directory, new, _is_left)
            if (directory / PLAN_FILE).is_file():
                self._write_card(directory)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """As the stock `evaluate`. What it finds before the cut and of the weights that are saved is on their card."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.pruning is not None:
            # after a cut the model is prepared anew; the stock search would add up the time of it and the metrics
            metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)
            now = DENSE if record_of(self._plain()) is None else self._step_of_weights
            self._evaluated[now] = (
                self.eval_dataset if eval_dataset is None else eval_dataset,
                {
                    name.removeprefix(f"{metric_key_prefix}_"): value
                    for name, value in metrics.items()
                    if isinstance(value, float) and not name.endswith(NOT_QUALITY)
                },
            )
        return metrics

    @property
    def _step_of_weights(self) -> int:
        return self.state.global_step if self._best_step is None else self._best_step

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of a pruned model (see `hf_prune.report.card`) in output_dir; else the stock one."""
        directory, stock = Path(str(self.args.output_dir)), super().create_model_card
        if self.pruning is None or not (directory / PLAN_FILE).is_file():
            stock(*args, **kwargs)
        elif self.is_world_process_zero():
            said = inspect.signature(stock).bind(*args, **kwargs).arguments
            given = {ours: said.get(theirs) for ours, theirs in CARD_FIELDS.items()}
            given = {key: [v] if key in ("tags", "datasets") and isinstance(v, str) else v for key, v in given.items()}
            name = getattr(self, "hub_model_id", None) or said.get("model_name")
            self._write_card(directory, name=name, **{key: v for key, v in given.items() if v})

    def _write_card(self, directory: Path, **given: Any) -> None:
        """A card that cannot be written is no reason to lose the run whose weights were just saved."""
        try:
            rows, pruned = self._evaluated.get(self._step_of_weights, (None, {}))
            of_dense, dense = self._evaluated.get(DENSE, (None, {}))
            if pruned:
                write_evaluation(
                    directory,
                    {DENSE: dense if of_dense is rows else {}, PRUNED: pruned},
                    **_said_of(rows),
                    command="PruningTrainer.evaluate()",
                )
            write_card(directory, **given)
        except Exception as error:
            warnings.warn(f"{directory} is saved, but not its card ({error!r}); see `hf-prune card`.", stacklevel=2)

    def _write(self, directory: Path, state_dict: Any = None, is_checkpoint: bool = False) -> None:
        super()._save(str(directory), state_dict)
        if not self.args.should_save:
            return
        home = directory
        if hasattr(self.model, "get_base_model"):
            home = directory / BASE
            copy.deepcopy(self.model).unload().save_pretrained(home)
        record = record_of(self._plain())
        if record is not None:
            record.save(home)
        if self._run is not None and is_checkpoint:
            self._run.save(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.pruning is None:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._teach()  # by the model as it was handed in
        directory = Path(resume_from_checkpoint)
        adapted = (directory / BASE).is_dir()
        home = directory / BASE if adapted else directory
        self._release_()
        saved = self._opened(home)
        self._run = Run.load(directory)
        if self._run.plan is not None:
            cut_by(self.model, self._run.plan, self.pruning)
        self._restore_(saved)
        if self._run.plan is not None:
            self.model._hf_prune = Record.load(home)
        if adapted:
            self._adapt_()
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        return None

    def _load_best_model(self) -> None:
        if self.pruning is None or not isinstance(self.model, PreTrainedModel):
            return super()._load_best_model()
        best = Path(str(self.state.best_model_checkpoint))
        try:
            self._restore_(self._opened(best))
        except ValueError as error:  # no reason to lose the run: the latest weights are there
            warnings.warn(f"The best model is not loaded, the latest one stays: {error}", stacklevel=2)
            return None
        self._best_step = step_of(best)
        return None

    def _opened(self, directory: Path) -> PreTrainedModel:
        """A checkpoint's model, through from_pretrained, which knows what the weights are called on disk."""
        return opened(type(self.model), directory, "The checkpoint", dtype=self.model.dtype)

    def _restore_(self, saved: PreTrainedModel) -> None:
        """A checkpoint's weights into the model.

        Raises:
            ValueError: they have other shapes.
        """
        check_shapes(self.model, saved, f"The checkpoint {saved.config._name_or_path}")
        self.model.load_state_dict(saved.state_dict())
        if saved.config.__dict__.get(KEY):
            setattr(self.model.config, KEY, saved.config.__dict__[KEY])


def _is_left(name: str) -> bool:
    """What a save does not take over of an earlier one; checkpoints, logs and notes stay."""
    return is_loaded(name) or fnmatch(name, HALF_WRITTEN)


class _Adapted:
    """Opens adapters on the pruned weights that lie beside them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cls = type(model)
        self.__name__ = f"{self.cls.__name__} with adapters"

    def from_pretrained(self, directory: Path, **options: Any) -> Any:
        from peft import PeftModel

        return PeftModel.from_pretrained(self.cls.from_pretrained(directory / BASE, **options), str(directory))


def _said_of(rows: Any) -> dict[str, Any]:
    """What a card says of the data: dataset, split, rows."""
    name = getattr(getattr(rows, "info", None), "dataset_name", None)
    return {
        "dataset": name if name and name not in FILE_FORMATS else "the evaluation data of the run",
        "split": str(getattr(rows, "split", None) or "evaluation"),
        "rows": len(rows) if hasattr(rows, "__len__") and not isinstance(rows, dict) else None,
    }


def cut_by(model: PreTrainedModel, plan: PruningPlan, config: PruningConfig) -> None:
    """Cut to a plan without data: the weights will be loaded."""
    apply(model, Analysis(describe(model), replace(config, repair="none"), [], 1), replace(plan, config={}))
