"""Fine-tune a classifier with the stock Trainer, once; later calls open what the first one saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    done = cache / "config.json"
    tokenizer = AutoTokenizer.from_pretrained(cache if done.exists() else source)
    if done.exists():
        return AutoModelForSequenceClassification.from_pretrained(cache), tokenizer
    set_seed(seed)
    labels = sorted(set(data["train"]["label"]))
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 5e-5, **arguments}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(cache.with_name(cache.name + ".trainer")),
            save_strategy="no",
            report_to="none",
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
    return model.eval(), tokenizer
