"""Latency targets on MiniLM: what was asked, what the measured table predicts, and what the cut model takes.

    make demo && python examples/latency_target.py

The last column is another measurement of dense and pruned model in turn (`report.measure.compare`), made at the end.
Prints each row, and a markdown table at the end. Set HF_PRUNE_CACHE to an empty directory to measure the tables afresh.
"""

from __future__ import annotations

import argparse
import copy
import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import PruningConfig
from hf_prune.decide.allocate import SHAPES
from hf_prune.demo.real import reviews, tokenized
from hf_prune.oneshot import analyze
from hf_prune.report.measure import compare
from hf_prune.report.table import Row, markdown

LENGTH = 128


def row(model, analysis, keep: float, batch: int, runs: int) -> Row:
    """One cut, without repair: the weights' values do not change how long they take."""
    config = analysis.config
    asked: Row = {"batch": f"{batch} x {LENGTH}", "shapes": config.shapes, "asked": f"{keep:.2f}"}
    try:
        plan = analysis.plan(keep)
    except ValueError as error:
        return asked | {"predicted": str(error).split("the least is ")[1].split(". ")[0].rstrip(".") + " at least"}
    small = copy.deepcopy(model)
    found = analysis.cut_(small, plan=plan).report["latency"]
    again = compare({"dense": model, "small": small}, shapes=((batch, LENGTH),), runs=runs)
    return asked | {
        "predicted": f"{found['predicted_ms'] / found['dense_ms']:.3f}",
        "realised": f"{found['keep']:.3f}",
        "realised ms": f"{found['realised_ms']:.1f} of {found['dense_ms']:.1f}",
        "compare": f"{1 / again['small']['latency'][0]['speedup']:.3f}",
        "MACs": f"{plan.cost['after']['macs_model'] / plan.cost['before']['macs_model']:.3f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo/minilm-rotten-tomatoes"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = tokenized(reviews(), tokenizer)["train"]
    warnings.simplefilter("always")
    rows: list[Row] = []
    for batch in args.batches:
        config = PruningConfig(
            keep=1.0, metric="latency", latency_batch_size=batch, sequence_length=LENGTH, repair="none",
            calibration_samples=128,
        )  # fmt: skip
        analysis = analyze(model, data, config, processing_class=tokenizer)
        print(f"batch {batch}: dense {analysis.plan(1.0).cost['dense_ms']:.1f} ms, table {analysis.table.source}")
        for shapes in SHAPES:
            here = replace(analysis, config=replace(analysis.config, shapes=shapes))
            for keep in args.keeps:
                rows.append(row(model, here, keep, batch, args.runs))
                print(rows[-1], flush=True)
    print(markdown(rows))
    load = os.getloadavg()[0]
    print(f"{torch.get_num_threads()} threads, fp32, one run; load average at the end {load:.1f}")


if __name__ == "__main__":
    main()
