"""Seconds a training step takes in PruningTrainer and in the stock Trainer, in turn, on MiniLM and real reviews.

    python examples/trainer_overhead.py [--pairs 12] [--steps 15] [--keep 0.5]

Two ratios, each the median of interleaved pairs with its range: PruningTrainer over Trainer where nothing is cut, and
the pruned model over the dense one, beside the ratio of their MACs. The cut itself is outside of both.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

from datasets import DatasetDict
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from hf_prune import PruningConfig, PruningTrainer, prune
from hf_prune.demo.finetune import finetuned
from hf_prune.demo.real import minilm_path, reviews, tokenized

WARM_UP = 3  # steps


class Clock(TrainerCallback):
    """Median seconds of a step, its data included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        ends = self.ends[WARM_UP:]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))


def step_seconds(cls, model, rows, tokenizer, steps: int, **more) -> float:
    """One short run of a copy of the model."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=32, report_to="none", save_strategy="no",
            logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        given = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [clock]}
        cls(model=copy.deepcopy(model), args=args, **given, **more).train()
    return clock.seconds


def summary(ratios: list[float]) -> dict[str, float]:
    quarter = statistics.quantiles(ratios, n=4)
    return {"median": statistics.median(ratios), "quartiles": [quarter[0], quarter[2]], "pairs": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"))
    args = parser.parse_args()
    data: DatasetDict = tokenized(reviews(), AutoTokenizer.from_pretrained(minilm_path()), 64)
    model, tokenizer = finetuned(minilm_path(), data, args.cache / "minilm-rotten-tomatoes")
    rows = data["train"]
    nothing = PruningConfig(keep=1.0, criterion="random", repair="none", calibration_samples=8, sequence_length=64)
    overhead, speed = [], []
    small = copy.deepcopy(model)
    half = PruningConfig(keep=args.keep, shapes="uniform", calibration_samples=128, sequence_length=64)
    report = prune(small, rows, half, processing_class=tokenizer).report
    for _ in range(args.pairs):
        stock = step_seconds(Trainer, model, rows, tokenizer, args.steps)
        ours = step_seconds(PruningTrainer, model, rows, tokenizer, args.steps, pruning=nothing)
        pruned = step_seconds(Trainer, small, rows, tokenizer, args.steps)
        overhead.append(ours / stock)
        speed.append(stock / pruned)
    print(json.dumps({
        "PruningTrainer over Trainer": summary(overhead),
        "dense over pruned": summary(speed),
        "MACs, dense over pruned": 1 / report["keep"],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
