"""How the time and the peak memory of prune() grow with the model and the calibration tokens.

    python examples/cost_growth.py

Llamas with random weights from configs (their accuracy means nothing, their cost does), float32, default settings, each
in a process of its own. The first four rows are model sizes; the next ones double one thing at a time from the first.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

from hf_prune.report.table import markdown


@dataclass(frozen=True)
class Size:
    """Layers L, hidden width D (FFN 3·D, heads of 64), calibration rows of 256 tokens."""

    layers: int
    hidden: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.layers} layers x {self.hidden}, {256 * self.rows:,} tokens"


BASE = Size(4, 256, 32)
SIZES = (BASE, Size(8, 384, 32), Size(12, 512, 32), Size(16, 768, 32))
DOUBLED = {
    "layers": replace(BASE, layers=8),
    "tokens": replace(BASE, rows=64),
    "width": replace(BASE, hidden=512),
}


def measured(size: Size) -> dict[str, float]:
    import torch
    from memory import peak_rss
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_prune import PruningConfig, prune

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
    )
    model = LlamaForCausalLM(config).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = [{"input_ids": torch.randint(4096, (8, 256))} for _ in range(size.rows // 8)]
    model(batches[0]["input_ids"][:2])  # what a first forward pass loads is no part of pruning
    seconds, growth = peak_rss(lambda: prune(model, batches, PruningConfig(keep=0.7, metric="params")))
    return {"model_bytes": weights, "seconds": seconds, "growth_bytes": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inside", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measured(Size(**args.inside))))
        return
    found = {}
    for size in dict.fromkeys((*SIZES, *DOUBLED.values())):
        command = [sys.executable, __file__, "--inside", json.dumps(asdict(size))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[size] = json.loads(done.stdout.splitlines()[-1])
    rows = [
        {
            "model and calibration": size.name,
            "weights": f"{cost['model_bytes'] / 2**20:.0f} MiB",
            "prune()": f"{cost['seconds']:.1f} s",
            "peak above the weights": f"{cost['growth_bytes'] / 2**20:.0f} MiB",
        }
        for size, cost in found.items()
    ]
    print(markdown(rows))
    for name, size in DOUBLED.items():
        powers = {
            what: math.log2(found[size][what] / found[BASE][what])
            for what in ("seconds", "growth_bytes", "model_bytes")
        }
        print(f"{name} doubled: " + ", ".join(f"{what} to the power {power:.2f}" for what, power in powers.items()))


if __name__ == "__main__":
    main()
