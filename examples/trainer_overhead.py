"""Seconds a training step takes in PruningTrainer and in the stock Trainer, step by step in turn, on real reviews.

    python examples/trainer_overhead.py [--steps 150] [--keep 0.5]

Three trainings of MiniLM advance together, each step on the same examples, in an order drawn anew for every step: the
stock Trainer, PruningTrainer where nothing is cut, and the stock Trainer with the pruned model. Two ratios of the
seconds of a step, each the median over the steps with its 95% interval: PruningTrainer over Trainer, and the dense
model over the pruned one, beside the ratio of their MACs. The cut itself is outside of both.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import threading
import time
from pathlib import Path

from datasets import DatasetDict
from tqdm.auto import tqdm
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from hf_prune import PruningConfig, PruningTrainer, prune
from hf_prune.demo.finetune import finetuned
from hf_prune.demo.real import minilm_path, reviews, tokenized

WARM_UP = 3  # steps


class Turn(TrainerCallback):
    """Holds a training in a thread of its own after every step, until `step` lets it take the next one."""

    def __init__(self, trainer: type[Trainer], model, rows, tokenizer, steps: int, **more) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        given = (trainer, model, rows, tokenizer, steps, more)
        threading.Thread(target=self._train, args=given, daemon=True).start()
        self.done.acquire()  # ready for its first step

    def _train(self, trainer: type[Trainer], model, rows, tokenizer, steps: int, more: dict) -> None:
        with tempfile.TemporaryDirectory() as out:
            args = TrainingArguments(
                out, max_steps=steps, per_device_train_batch_size=16, report_to="none", save_strategy="no",
                logging_strategy="no", dataloader_pin_memory=False, disable_tqdm=True,
            )  # fmt: skip
            given = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [self]}
            trainer(model=copy.deepcopy(model), args=args, **given, **more).train()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._pause()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._pause()

    def _pause(self) -> None:
        self.done.release()
        self.go.acquire()

    def step(self) -> float:
        """Let it take one step, its data included; the seconds of it."""
        start = time.perf_counter()
        self.go.release()
        self.done.acquire()
        return time.perf_counter() - start


def summary(ratios: list[float]) -> dict[str, float | list[float]]:
    """Median of the ratios and its 95% interval (1,000 resamples of the steps)."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {"median": statistics.median(ratios), "interval": [medians[25], medians[-26]], "steps": len(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--cache", type=Path, default=Path(".cache/demo"))
    args = parser.parse_args()
    data: DatasetDict = tokenized(reviews(), AutoTokenizer.from_pretrained(minilm_path()), 64)
    model, tokenizer = finetuned(minilm_path(), data, args.cache / "minilm-rotten-tomatoes")
    rows = data["train"]
    small = copy.deepcopy(model)
    half = PruningConfig(keep=args.keep, shapes="uniform", calibration_samples=128, sequence_length=64)
    report = prune(small, rows, half, processing_class=tokenizer).report
    nothing = PruningConfig(keep=1.0, criterion="random", repair="none", calibration_samples=8, sequence_length=64)
    total = args.steps + WARM_UP
    runs = {
        "stock": Turn(Trainer, model, rows, tokenizer, total),
        "ours": Turn(PruningTrainer, model, rows, tokenizer, total, pruning=nothing),
        "pruned": Turn(Trainer, small, rows, tokenizer, total),
    }
    order, seconds = random.Random(0), []
    for _ in tqdm(range(total), desc="steps"):
        seconds.append({name: runs[name].step() for name in order.sample(list(runs), len(runs))})
    seconds = seconds[WARM_UP:]
    print(json.dumps({
        "PruningTrainer over Trainer": summary([s["ours"] / s["stock"] for s in seconds]),
        "dense over pruned": summary([s["stock"] / s["pruned"] for s in seconds]),
        "MACs, dense over pruned": 1 / report["keep"],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
