"""A narrower stream: MiniLM with fewer heads and channels in its stock class, and SmolLM2-135M by width and by neurons.

    make texts && python examples/width.py                          # three fine-tunings, about an hour on two cores
    python examples/width.py --part encoder --seeds 0 --no-training
    python examples/width.py --part decoder --tokens 8192 --windows 6

MiniLM at half of the multiply-adds: only channels (and the heads that go with them), then channels and neurons, cut and
repaired, and after one epoch with the dense model as teacher. SmolLM2 at 80% of the block parameters by width and by
neurons: perplexity on two texts that nothing is fitted to, and medians of interleaved passes as shares of the dense
model's time. A JSON line each.

Measured: MiniLM, two fine-tunings, channels alone (192 x 6 heads, 42% of the multiply-adds) 78.9 of 82.7 points
untrained and 81.7 after the epoch; channels and neurons (half) 81.2 and 82.4. SmolLM2, 8,192 tokens: by width (450 of
576) perplexity 212 and 156 at 0.85 of a pass's and 0.92 of a decoded token's time; by neurons 85 and 67 at 0.89 and
0.98; dense 43 and 40. Width is for encoders; of a language model take neurons, KV groups or layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "benchmark"))

from depth import latencies
from recovery import arguments
from smollm2 import perplexity, smollm2
from tasks import ENCODER, Task, classifier
from texts import austen, brown, calibration, descriptions, docstrings, evaluation, film_reviews, news
from transformers import default_data_collator, set_seed

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer, analyze, prune

CACHE = Path(".cache")
STREAMS = {"channels": ["hidden"], "channels and neurons": ["hidden", "neurons"], "neurons": ["neurons"]}


def show(**row: Any) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def encoder(
    seed: int, streams: Mapping[str, list[str]], keep: float, calibration_rows: int, training: bool
) -> list[dict[str, Any]]:
    """MiniLM, fine-tuned with a seed: accuracy on the validation rows, which choose nothing."""
    task = classifier("encoder", ENCODER, CACHE, seed)
    dense = task.size(task.model)["macs_model"]

    def row(name: str, model: Any, **more: Any) -> dict[str, Any]:
        found, config = task.evaluate(model.eval())["accuracy"], model.config
        sizes = [config.hidden_size, config.num_attention_heads, config.intermediate_size]
        macs = task.size(model)["macs_model"] / dense
        return show(seed=seed, model=name, accuracy=round(found, 4), macs=round(macs, 4), sizes=sizes, **more)

    rows = [row("dense", task.model)]
    for name, units in streams.items():
        model, started = copy.deepcopy(task.model), time.perf_counter()
        config = task.config(keep=keep, units=units, calibration_samples=calibration_rows)
        prune(model, task.rows, config, processing_class=task.tokenizer)
        rows.append(row(name, model, seconds=round(time.perf_counter() - started)))
        if training:
            train_(task, model)
            rows.append(row(f"{name}, one epoch", model))
    return rows


def train_(task: Task, model: Any) -> None:
    """One epoch with the dense model as teacher, whose hidden states are compared at the channels that are left."""
    set_seed(task.seed)
    with tempfile.TemporaryDirectory() as out:
        PruningTrainer(
            model=model,
            args=arguments(task, out),
            train_dataset=task.rows,
            processing_class=task.tokenizer,
            distillation=DistillationConfig(),
            teacher=copy.deepcopy(task.model),
        ).train()


def decoder(streams: Mapping[str, list[str]], keep: float, tokens: int, windows: int) -> None:
    """SmolLM2, where the division of a budget is chosen on text of a source that nothing is fitted to."""
    dense, tokenizer = smollm2(CACHE / "smollm2")
    texts = {"brown": evaluation(tokenizer, brown(), windows), "austen": evaluation(tokenizer, austen(), windows)}
    calibrated_on = calibration(tokenizer, tokens, sources=[film_reviews, docstrings, descriptions])
    other = calibration(tokenizer, tokens // 4, sources=[news])
    models: dict[str, Any] = {}

    def row(name: str, model: Any, **more: Any) -> None:
        found = {text: round(perplexity(model, some), 2) for text, some in texts.items()}
        show(model=name, **found, hidden=model.config.hidden_size, ffn=model.config.intermediate_size, **more)

    row("dense", dense)
    for name, units in streams.items():
        config = PruningConfig(keep=keep, metric="params", units=units, sequence_length=128)
        started = time.perf_counter()
        analysis = analyze(dense, calibrated_on, config, data_collator=default_data_collator, guard=other)
        models[name] = copy.deepcopy(dense)
        kept = analysis.cut_(models[name]).report["keep"]
        row(name, models[name], keep=round(kept, 4), seconds=round(time.perf_counter() - started))
    for name, shares in latencies(dense, models, "cpu").items():
        show(model=name, **{key: round(share, 3) for key, share in shares.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("encoder", "decoder", "both"), default="both")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", type=float, default=None, help="default: 0.5 of the encoder, 0.8 of the decoder")
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--rows", type=int, default=1024, help="to calibrate the encoder with")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate the decoder with")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens a text, to evaluate the decoder on")
    parser.add_argument("--units", default=",".join(STREAMS), help="of these rows")
    options = parser.parse_args()
    streams = {name: STREAMS[name] for name in options.units.split(",")}
    rows: list[dict[str, Any]] = []
    if options.part != "decoder":
        for seed in map(int, options.seeds.split(",")):
            rows += encoder(seed, streams, options.keep or 0.5, options.rows, not options.no_training)
    for name in dict.fromkeys(row["model"] for row in rows):
        show(model=name, mean=round(statistics.mean(row["accuracy"] for row in rows if row["model"] == name), 4))
    if options.part != "encoder":
        decoder(streams, options.keep or 0.8, options.tokens, options.windows)


if __name__ == "__main__":
    main()
