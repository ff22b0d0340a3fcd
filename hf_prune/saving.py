"""What PruningTrainer writes and reads: checkpoints to resume from, and models that are proven to reload."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from .anatomy import describe
from .checkpoint.directory import beside, carry, resolved, written
from .checkpoint.history import PLAN_FILE, Record, record_of
from .checkpoint.layout import KEY
from .checkpoint.proof import BASE, is_loaded, prove
from .config import PruningConfig
from .oneshot import Analysis, apply
from .plan import PruningPlan
from .report.card import DENSE, PRUNED, write_card, write_evaluation
from .rounds import STATE_FILE, Run, complete_checkpoints, is_complete
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

    def _checkpoint(self, given: str | bool | None) -> str | None:
        """The directory to resume from."""
        if given is True:
            found = complete_checkpoints(Path(str(self.args.output_dir)))
            if not found:
                warnings.warn(f"No complete checkpoint in {self.args.output_dir}: training starts anew.", stacklevel=3)
                return None
            given = str(found[-1])
        if not given:
            return None
        if not is_complete(Path(given)):
            raise ValueError(f"{given} is no complete checkpoint of a run with pruning (no {STATE_FILE} in it).")
        theirs, ours = Run.load(Path(given)).config.to_dict(), self.pruning.to_dict()
        changed = {key: (theirs[key], ours[key]) for key in ours if theirs[key] != ours[key]}
        if changed:
            raise ValueError(
                f"{given} was made with another PruningConfig; (there, here): {changed}. Resume with the same, or "
                "train into another output_dir."
            )
        return given

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
        if self.pruning is None or directory.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            self._write(directory, state_dict, is_checkpoint=True)
        elif self.args.should_save:
            directory = resolved(directory)
            with beside(directory) as new:
                self._write(new, state_dict)
                if isinstance(self.model, PreTrainedModel):
                    prove(self.model, new)
                carry(directory, new, is_loaded)  # checkpoints, logs and notes stay; no weights of an earlier save do
            if isinstance(self.model, PreTrainedModel) and (directory / PLAN_FILE).is_file():
                self._write_card(directory)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> dict[str, float]:
        """As the stock `evaluate`. What it finds before the cut and of the weights that are saved is on their card."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **kwargs)
        if self.pruning is not None:
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
        if self.pruning is None or not self.args.should_save:
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
        self._run = Run.load(directory)
        self._release_()
        if self._run.plan is not None:
            cut_by(self.model, self._run.plan, self.pruning)
        adapted = (directory / BASE).is_dir()
        home = directory / BASE if adapted else directory
        self._restore_(home)
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
        self._best_step = int(best.name.rpartition("-")[2])
        return self._restore_(best)

    def _restore_(self, directory: Path) -> None:
        """Weights of a checkpoint into the model, through from_pretrained, which knows what they are called on disk."""
        saved = type(self.model).from_pretrained(directory, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        if saved.config.__dict__.get(KEY):
            setattr(self.model.config, KEY, saved.config.__dict__[KEY])


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
