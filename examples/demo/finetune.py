"""Fine-tune a classifier with the stock Trainer, once; later calls open what the first one saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def finetuned(source: Path, data: DatasetDict, cache: Path, seed: int = 0, **arguments: Any) -> tuple[Any, Any]:
    """(model, tokenizer) of `source` trained on `data["train"]` (tokenised, with labels), cached in `cache`."""
    if not (cache / "config.json").exists():
        _train(source, data, cache, seed, arguments)
    model = AutoModelForSequenceClassification.from_pretrained(cache)
    return model.eval(), AutoTokenizer.from_pretrained(cache)


def _train(source: Path, data: DatasetDict, cache: Path, seed: int, arguments: dict[str, Any]) -> None:
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(source)
    labels = sorted(set(data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 5e-5, **arguments}
    work = cache.with_name(cache.name + ".trainer")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            **settings,
        ),
        train_dataset=data["train"],
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    trainer.train()
    temporary = cache.with_name(cache.name + ".tmp")
    tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    temporary.rename(cache)
    shutil.rmtree(work, ignore_errors=True)
