"""SmolLM2-135M with fewer layers, with narrower ones, and with both: perplexity and measured latency.

    make texts && python examples/depth.py                        # about two hours on two cores
    python examples/depth.py --keeps 0.9 --tokens 8192 --windows 6
    python examples/depth.py --device cuda                        # minutes; latency of the GPU and of its host's CPU

For each share of the block parameters: neurons and KV groups, layers alone, and all together, where the division of the
budget is chosen on text of a source that nothing is fitted to (`guard`): what is refitted most looks best on its own
kind of text. The two texts that are evaluated on are of neither. Latency is a share of the dense one, medians of
interleaved passes: a forward pass over 128 tokens, and a token after a prompt of 128. A JSON line each, and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from curves import draw
from smollm2 import perplexity, smollm2
from texts import austen, brown, calibration, descriptions, docstrings, evaluation, film_reviews, news
from transformers import default_data_collator

from hf_prune import PruningConfig, analyze
from hf_prune.decide.latency.clock import synchronize
from hf_prune.model.probe import cache_argument

UNITS = {
    "neurons and KV groups": ["neurons", "kv_groups"],
    "layers": ["layers"],
    "together": ["neurons", "kv_groups", "layers"],
}
PROMPT, DECODED = 128, 8
PASSES = {"forward": "forward pass, 1 × 128", "decode": "each token after it"}


@torch.inference_mode()
def seconds(model: Any) -> tuple[float, float]:
    """Of a pass over the prompt, and of each token after it."""
    ids = torch.arange(PROMPT, device=model.device)[None] + 100
    name = cache_argument(model)
    started = now(model.device)
    cache = model(ids, use_cache=True)[name]
    first = now(model.device)
    for _ in range(DECODED):
        cache = model(ids[:, :1], **{name: cache})[name]
    return first - started, (now(model.device) - first) / DECODED


def now(device: torch.device) -> float:
    synchronize(device)
    return time.perf_counter()


def latencies(dense: Any, models: dict[str, Any], device: str, rounds: int = 15) -> dict[str, dict[str, float]]:
    """Shares of the dense model's time, medians over rounds in which every model has its turn."""
    for model in (dense, *models.values()):
        seconds(model.to(device))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        base = seconds(dense)
        for name, model in models.items():
            found[name].append(tuple(a / b for a, b in zip(seconds(model), base, strict=True)))  # type: ignore[arg-type]
    return {
        name: {f"{key}_{device}": statistics.median(pair[i] for pair in pairs) for i, key in enumerate(PASSES)}
        for name, pairs in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keeps", default="0.9,0.8,0.7")
    parser.add_argument("--tokens", type=int, default=16384, help="to calibrate with")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens a text, to evaluate on")
    parser.add_argument("--criterion", default="angular", help="which layers go")
    parser.add_argument("--device", default="cpu", help="to cut on; latency is measured there and on the CPU")
    parser.add_argument("--picture", type=Path, default=Path(".cache/depth.png"))
    options = parser.parse_args()
    devices = list(dict.fromkeys([options.device, "cpu"]))
    dense, tokenizer = smollm2(Path(".cache/smollm2"))
    texts = {"brown": evaluation(tokenizer, brown(), options.windows)}
    texts["austen"] = evaluation(tokenizer, austen(), options.windows)
    calibrated_on = calibration(tokenizer, options.tokens, sources=[film_reviews, docstrings, descriptions])
    other = calibration(tokenizer, options.tokens // 4, sources=[news])

    def judged(model: Any) -> dict[str, float]:
        found = {f"perplexity_{text}": round(perplexity(model, windows), 2) for text, windows in texts.items()}
        return found | {"perplexity": round(statistics.geometric_mean(found.values()), 2)}

    whole, rows = judged(dense.to(options.device)), []
    print(json.dumps({"model": "dense", **whole}), flush=True)
    for keep in map(float, options.keeps.split(",")):
        models, figures = {}, {}
        for name, units in UNITS.items():
            config = PruningConfig(
                keep=keep,
                metric="params",
                units=units,
                align=32,  # that of a CPU, on a GPU as well
                sequence_length=128,
                layer_criterion=options.criterion,
            )
            started = time.perf_counter()
            analysis = analyze(
                dense.to(options.device), calibrated_on, config, data_collator=default_data_collator, guard=other
            )
            models[name] = copy.deepcopy(dense)
            result = analysis.cut_(models[name])
            figures[name] = {
                "keep": keep,
                "units": name,
                "kept": round(result.report["keep"], 4),
                "layers": len(models[name].model.layers),
                **judged(models[name]),
                "seconds": round(time.perf_counter() - started),
                "divisions": [[row["kept"], row["held_out_loss"]] for row in result.report["divisions"]],
            }
        for device in devices:
            for name, shares in latencies(dense, models, device).items():
                figures[name] |= {key: round(share, 3) for key, share in shares.items()}
        for row in figures.values():
            print(json.dumps(row), flush=True)
        rows += figures.values()
    panels = {f"{key}_{where}": f"{what}, {where} (dense = 1)" for where in devices for key, what in PASSES.items()}
    draw(rows, whole["perplexity"], panels, "perplexity", options.picture, "log")


if __name__ == "__main__":
    main()
