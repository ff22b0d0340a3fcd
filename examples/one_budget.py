"""MiniLM at the same file size by heads and neurons, by layers, by tokens, and by all of them: accuracy, no training.

    python examples/one_budget.py                            # three fine-tunings, about an hour on two cores
    python examples/one_budget.py --seeds 0 --keeps 0.65

For each share of the bytes: what each kind of unit alone and all together leave of the accuracy on Rotten Tomatoes. A
target that a kind of unit cannot reach has no row. A JSON line each, and a picture of their means.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "benchmark"))

from curves import draw
from small_encoder import CACHE, accuracy
from tasks import ENCODER, classifier

from hf_prune import prune
from hf_prune.demo.real import reviews

UNITS = {
    "heads and neurons": ["heads", "neurons"],
    "layers": ["layers"],
    "tokens": ["tokens"],
    "together": ["heads", "neurons", "layers", "tokens"],
}


def rows_of(seed: int, keeps: list[float]) -> list[dict[str, Any]]:
    data, task = reviews("rotten_tomatoes"), classifier("encoder", ENCODER, CACHE, seed)
    texts, valid = list(data["train"]["text"]), data["validation"]

    def row(units: str, keep: float, model: Any, tokenizer: Any) -> dict[str, Any]:
        right = accuracy(model.eval(), tokenizer, list(valid["text"]), list(valid["label"]), ENCODER.length)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        found = {"seed": seed, "units": units, "keep": keep, "accuracy": right, "bytes": size, "MB": size / 1e6}
        print(json.dumps(found), flush=True)
        return found

    found = [row("dense", 1.0, task.model, task.tokenizer)]
    for keep in keeps:
        for name, units in UNITS.items():
            config = task.config(keep=keep, metric="bytes", shapes="per_layer", units=units)
            model = copy.deepcopy(task.model)
            try:
                result = prune(model, task.rows, config, processing_class=task.tokenizer, vocabulary=texts)
            except ValueError as error:  # out of reach for these units
                print(json.dumps({"seed": seed, "units": name, "keep": keep, "error": str(error)[:160]}), flush=True)
                continue
            found.append(row(name, keep, model, result.processing_class))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keeps", default="0.8,0.65,0.5")
    parser.add_argument("--picture", type=Path, default=CACHE / "one_budget.png")
    options = parser.parse_args()
    keeps = [float(keep) for keep in options.keeps.split(",")]
    rows = [row for seed in map(int, options.seeds.split(",")) for row in rows_of(seed, keeps)]
    dense = fmean(row["accuracy"] for row in rows if row["units"] == "dense")
    cut = [row for row in rows if row["units"] != "dense"]
    draw(cut, dense, {"MB": "MB of weights (fp32)"}, "accuracy", options.picture)


if __name__ == "__main__":
    main()
