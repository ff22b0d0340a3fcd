"""MiniLM for one task: half of its multiply-adds, and only the words of the task.

    make texts && python examples/small_encoder.py                 # three fine-tunings, about an hour on two cores
    python examples/small_encoder.py --seeds 0 --no-training       # one, without the epoch after the cut

For each fine-tuning on Rotten Tomatoes: the dense model; per-layer shapes at half of the multiply-adds; then only the
tokens that the training texts use at least twice; three of the six layers, repaired; one epoch with the dense model as
teacher, then the vocabulary; and the INT8 ONNX file of that. A JSON line each, and their means at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent / "benchmark"))

from recovery import trained
from tasks import ENCODER, Task, classifier

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.demo.real import reviews
from hf_prune.export.onnx import to_onnx

CACHE = Path(".cache")


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, texts: list[str], labels: list[int], length: int) -> float:
    order, right = sorted(range(len(texts)), key=lambda i: len(texts[i])), 0
    for start in range(0, len(order), 32):
        some = order[start : start + 32]
        inputs = tokenizer(
            [texts[i] for i in some], truncation=True, max_length=length, padding=True, return_tensors="pt"
        )
        right += int((model(**inputs).logits.argmax(-1) == torch.tensor([labels[i] for i in some])).sum())
    return right / len(texts)


def fewer_words(task: Task, model: Any, texts: list[str], least: int) -> Any:
    """Only the tokens that the training texts use so often; everything else stays."""
    config = PruningConfig(keep=1.0, metric="params", units=["tokens"], min_count=least, calibration_samples=64)
    return prune(model, task.rows, config, processing_class=task.tokenizer, vocabulary=texts).processing_class


def rows_of(seed: int, least: int, training: bool) -> list[dict[str, Any]]:
    data = reviews("rotten_tomatoes")
    texts, valid = list(data["train"]["text"]), data["validation"]
    found: list[dict[str, Any]] = []

    def note(name: str, model: Any, tokenizer: Any) -> None:
        model.eval()
        right = accuracy(model, tokenizer, list(valid["text"]), list(valid["label"]), ENCODER.length)
        row = {"seed": seed, "model": name, "accuracy": right, "parameters": sum(p.numel() for p in model.parameters())}
        with tempfile.TemporaryDirectory() as out:
            if "vocabulary" in name:
                save_pretrained(model, Path(out) / "model")  # proven to reload
                to_onnx(model, Path(out) / "onnx", int8=True)
                row["int8_bytes"] = sum(file.stat().st_size for file in Path(out, "onnx").glob("model.onnx*"))
        found.append(row)
        print(json.dumps(row), flush=True)

    def fresh() -> Task:
        return classifier("encoder", ENCODER, CACHE, seed)

    task = fresh()
    note("dense", task.model, task.tokenizer)
    words = copy.deepcopy(task.model)
    note(f"vocabulary >= {least}", words, fewer_words(task, words, texts, least))
    for name, config in {
        "per layer": {"keep": 0.5, "shapes": "per_layer"},
        "three layers": {"keep": 0.51, "units": ["layers"]},
    }.items():
        model = copy.deepcopy(task.model)
        prune(model, task.rows, task.config(**config), processing_class=task.tokenizer)
        note(name, model, task.tokenizer)
        if name == "per layer":
            note("per layer + vocabulary", model, fewer_words(task, model, texts, least))
    if training:
        model = trained("per_layer")(task).cut(copy.deepcopy(task.model), 0.5)
        note("per layer, one epoch", model, task.tokenizer)
        note("per layer, one epoch + vocabulary", model, fewer_words(task, model, texts, least))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--min-count", type=int, default=2)
    parser.add_argument("--no-training", action="store_true")
    options = parser.parse_args()
    rows = [
        row
        for seed in map(int, options.seeds.split(","))
        for row in rows_of(seed, options.min_count, not options.no_training)
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        same = [row for row in rows if row["model"] == name]
        print(json.dumps({"model": name, "accuracy": statistics.mean(row["accuracy"] for row in same)}))


if __name__ == "__main__":
    main()
