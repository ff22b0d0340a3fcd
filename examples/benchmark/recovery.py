"""Training after the cut, as rows of the benchmark: the same budget for each, from the same dense model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from tasks import Prepared, Task
from transformers import Trainer, TrainingArguments, set_seed

from hf_prune import DistillationConfig, PruningCallback, PruningTrainer


def arguments(task: Task, out: str, **changes: Any) -> TrainingArguments:
    given = {**task.training, "seed": task.seed, "save_strategy": "no", "report_to": "none", **changes}
    gpu = torch.cuda.is_available()
    return TrainingArguments(out, logging_strategy="no", use_cpu=not gpu, dataloader_pin_memory=gpu, **given)


def _common(task: Task, model: Any, args: TrainingArguments) -> dict[str, Any]:
    rows = task.rows if task.training_rows is None else task.training_rows
    return {
        "model": model, "args": args, "train_dataset": rows, "processing_class": task.tokenizer,
        "data_collator": task.collator,
    }  # fmt: skip


def trained(
    shapes: str, distilled: bool = True, lora: bool = False, learning_rate: float | None = None, **fields: Any
) -> Callable[[Task], Prepared]:
    """PruningTrainer with these fields of PruningConfig."""

    def prepare(task: Task) -> Prepared:
        def cut(model: Any, keep: float) -> Any:
            set_seed(task.seed)
            with tempfile.TemporaryDirectory() as out:
                changes = {} if learning_rate is None else {"learning_rate": learning_rate}
                trainer = PruningTrainer(
                    **_common(task, model, arguments(task, out, **changes)),
                    pruning=task.config(keep=keep, shapes=shapes, **fields),
                    distillation=DistillationConfig(**task.distillation) if distilled else None,
                    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **task.lora)
                    if lora
                    else None,
                )
                trainer.train()
            return trainer.model

        return Prepared(cut)

    return prepare


def masked(shapes: str, **fields: Any) -> Callable[[Task], Prepared]:
    """PruningCallback in a stock Trainer."""

    def prepare(task: Task) -> Prepared:
        def cut(model: Any, keep: float) -> Any:
            set_seed(task.seed)
            with tempfile.TemporaryDirectory() as out:
                callback = PruningCallback(task.config(keep=keep, shapes=shapes, **fields))
                Trainer(**_common(task, model, arguments(task, out)), callbacks=[callback]).train()
            return model

        return Prepared(cut)

    return prepare


def longer(task: Task) -> Prepared:
    """The dense model, trained as much again."""

    def train(model: Any, keep: float) -> Any:
        set_seed(task.seed)
        with tempfile.TemporaryDirectory() as out:
            Trainer(**_common(task, model, arguments(task, out))).train()
        return model

    return Prepared(train)
