"""What is pruned and how it is judged: a fine-tuned model or a language model, calibration rows, an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, default_data_collator

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other examples

import cloze
from smollm2 import perplexity, smollm2
from texts import PROSE, austen, brown, calibration, evaluation

from hf_prune import PruningConfig, describe
from hf_prune.decide.costs import report as cost_report
from hf_prune.demo.finetune import finetuned
from hf_prune.demo.real import minilm_path, reviews, tokenized
from hf_prune.model.batches import Batch, draw
from hf_prune.oneshot import Analysis, analyze

Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Settings:
    """What the figures of a task depend on. A results directory holds those of one setting a task."""

    keeps: tuple[float, ...]
    seeds: tuple[int, ...]
    length: int  # tokens of a row (of a calibration window)
    calibration: int  # rows
    source: str = ""  # of the reviews
    train_rows: int | None = None  # None: all
    validation_rows: int | None = None
    windows: int = 12  # of 512 tokens a text, for perplexity
    items: int = 50  # a text, for the cloze task
    latency: Shapes = ()
    runs: int = 10
    cost_keep: float = 0.5
    training_tokens: int = 0  # of a language model, after the cut


@dataclass(frozen=True)
class Prepared:
    """Scores, ready to cut at any keep. `cut` may change the model that it gets; it returns the pruned one."""

    cut: Callable[[Any, float], Any]
    identity: Callable[[float], str] | None = None  # equal strings mean equal models, known without cutting


@dataclass
class Task:
    """A settled question: this model, these calibration rows, this evaluation. One for every seed."""

    name: str
    seed: int
    model: Any
    tokenizer: Any
    rows: Dataset
    fields: dict[str, Any]  # of PruningConfig: the same for every method
    evaluate: Callable[[Any], dict[str, Any]]
    collator: Any = None
    shallow: Callable[[], Any] | None = None  # a model of half the layers, fine-tuned in the same way
    training: dict[str, Any] = field(default_factory=dict)  # TrainingArguments, for the rows that train after the cut
    training_rows: Dataset | None = None  # None: `rows`
    distillation: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    analyses: dict[Any, Analysis] = field(default_factory=dict)

    def config(self, **changes: Any) -> PruningConfig:
        return PruningConfig(**{**self.fields, **changes})

    def batches(self) -> list[Batch]:
        """The calibration rows exactly as hf_prune draws them, for the peers."""
        return draw(self.model, self.rows, self.fields["calibration_samples"], self.seed, self.tokenizer, self.collator)

    def analysis(self, config: PruningConfig) -> Analysis:
        """Scores for this config, computed once for all configs that share a criterion and units."""
        key = (config.criterion or "fisher", tuple(config.units or ()))  # every task here has a loss
        if key not in self.analyses:
            whole = replace(config, keep=1.0)  # any keep can be asked for later
            self.analyses[key] = analyze(
                self.model, self.rows, whole, processing_class=self.tokenizer, data_collator=self.collator
            )
        found = self.analyses[key]
        return replace(found, config=replace(config, criterion=found.config.criterion))

    def size(self, model: Any) -> dict[str, Any]:
        """What a model costs by hf_prune's own accounting, whoever pruned it."""
        anatomy = describe(model)
        cost = cost_report(anatomy, anatomy.sizes, self.fields["sequence_length"])
        tensors = list(model.parameters())
        return {**cost, "bytes": sum(p.numel() * p.element_size() for p in tensors)}

    @property
    def target(self) -> str:
        """The figure of `size` that `keep` is a fraction of."""
        config = self.config()
        return f"{config.metric}_{config.scope}"


def classifier(name: str, at: Settings, cache: Path, seed: int) -> Task:
    """MiniLM-L6 fine-tuned on reviews with this seed; the split into training and validation rows never changes."""
    data = reviews(at.source)
    wanted = {"train": at.train_rows, "validation": at.validation_rows}
    data = DatasetDict({part: rows.select(range(wanted[part] or len(rows))) for part, rows in data.items()})
    tokens = tokenized(data, AutoTokenizer.from_pretrained(minilm_path()), at.length)
    suffix = f"-{at.source.replace('_', '-')}" + (f"-seed{seed}" if seed else "")
    suffix += f"-{at.train_rows}rows" if at.train_rows else ""
    home = cache / "demo"
    home.mkdir(parents=True, exist_ok=True)
    model, tokenizer = finetuned(minilm_path(), tokens, home / f"minilm{suffix}", seed)

    def shallow() -> Any:
        source = home / "minilm-3-layers"
        if not (source / "config.json").exists():
            tokenizer.save_pretrained(source)
            AutoModel.from_pretrained(minilm_path(), num_hidden_layers=3).save_pretrained(source)
        return finetuned(source, tokens, home / f"minilm-3-layers{suffix}", seed)[0]

    return Task(
        name=name,
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        rows=tokens["train"],
        fields={"sequence_length": at.length, "calibration_samples": at.calibration, "calibration_seed": seed},
        evaluate=lambda pruned: _accuracy(_correctness(pruned, tokens["validation"], tokenizer)),
        shallow=shallow,
        training={
            "num_train_epochs": 1,
            "per_device_train_batch_size": 32,
            "learning_rate": 2e-4,
            "warmup_steps": 0.1,
            "train_sampling_strategy": "group_by_length",
        },
        lora={"task_type": "SEQ_CLS"},
    )


@torch.inference_mode()
def _correctness(model: Any, rows: Dataset, tokenizer: Any, batch: int = 32) -> str:
    """One character a row, in the order of the rows: 1 where the model is right, else 0."""
    collate = DataCollatorWithPadding(tokenizer)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    right = dict.fromkeys(order, "0")
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        inputs = collate([rows[i] for i in some]).to(model.device)
        hits = inputs.pop("labels") == model(**inputs).logits.argmax(-1)
        right.update(zip(some, ("01"[int(hit)] for hit in hits), strict=True))
    return "".join(right[i] for i in range(len(order)))


def _accuracy(right: str) -> dict[str, Any]:
    return {"accuracy": right.count("1") / len(right), "right": right}


def language_model(name: str, at: Settings, cache: Path, seed: int) -> Task:
    """SmolLM2-135M, calibrated on four kinds of text (another draw for every seed), judged on two others."""
    model, tokenizer = smollm2(cache / "smollm2")
    model.get_input_embeddings().requires_grad_(not at.training_tokens)  # few tokens train few of the 49,152 words
    rows = calibration(tokenizer, at.calibration * at.length, at.length, seed)
    texts = {"brown": list(brown(cache / "texts" / "package")), "austen": list(austen(cache / "texts" / "austen"))}
    windows = {text: evaluation(tokenizer, iter(whole), at.windows) for text, whole in texts.items()}
    questions = [item for whole in texts.values() for item in cloze.items(tokenizer, "\n\n".join(whole), at.items)]

    def evaluate(pruned: Any) -> dict[str, Any]:
        found = {f"perplexity_{text}": perplexity(pruned, some, batch=4) for text, some in windows.items()}
        return {**found, **_accuracy(cloze.correctness(pruned, questions))}

    return Task(
        name=name,
        seed=seed,
        model=model,
        tokenizer=tokenizer,
        rows=rows,
        fields={
            "metric": "params",
            "sequence_length": at.length,
            "calibration_samples": len(rows),
            "calibration_seed": seed,
        },
        evaluate=evaluate,
        collator=default_data_collator,
        training={
            "num_train_epochs": 1,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-4,
            "warmup_steps": 0.1,
            "bf16": True,
        },
        training_rows=_labelled(calibration(tokenizer, at.training_tokens, at.length, seed, PROSE))
        if at.training_tokens
        else None,
        distillation={"task_weight": 1.0, "logits_weight": 1.0, "temperature": 1.0, "hidden_weight": 0.0},
        lora={"task_type": "CAUSAL_LM"},
    )


def _labelled(rows: Dataset) -> Dataset:
    """Rows of a language model, which predicts what it reads."""
    return rows.map(lambda row: {"labels": row["input_ids"]})


ENCODER = Settings(
    keeps=(0.7, 0.5, 0.4, 0.3, 0.2), seeds=(0, 1, 2), length=64, calibration=1024, source="rotten_tomatoes",
    latency=((1, 64), (32, 64)),
)  # fmt: skip
IMDB = Settings(
    keeps=(0.5, 0.3), seeds=(0,), length=256, calibration=512, source="imdb", train_rows=2000, validation_rows=500,
    latency=((1, 256), (8, 256)), runs=5,
)  # fmt: skip
LLM = Settings(
    keeps=(0.9, 0.8, 0.7, 0.5), seeds=(0,), length=256, calibration=64, windows=8, items=25, cost_keep=0.8
)  # fmt: skip
RECOVERY = replace(ENCODER, keeps=(0.5, 0.3, 0.2, 0.1), latency=())
LLM_RECOVERY = replace(LLM, keeps=(0.7,), training_tokens=204800)

TASKS: dict[str, tuple[Callable[[str, Settings, Path, int], Task], Settings]] = {
    "encoder": (classifier, ENCODER),
    "imdb": (classifier, IMDB),
    "llm": (language_model, LLM),
    "recovery": (classifier, RECOVERY),
    "llm_recovery": (language_model, LLM_RECOVERY),
}


def quick(at: Settings) -> Settings:
    """A few rows, to see that everything runs; the figures mean nothing."""
    few = {"train_rows": 256, "validation_rows": 64} if at.source else {"windows": 2, "items": 4}
    few |= {"training_tokens": 4096} if at.training_tokens else {}
    keeps = (at.keeps[0], at.cost_keep)
    return replace(at, keeps=keeps, seeds=(0,), calibration=16 if not at.source else 64, runs=2, **few)
