"""A dense and a pruned language model in llama.cpp: the tokens that transformers gives, and tokens per second in turn.

    pip install llama-cpp-python        # builds llama.cpp: ten minutes on two cores
    python examples/serve_llama_cpp.py .cache/smollm2 .cache/smollm2-kv --out .cache/llama_cpp

Prints one JSON line: per model the size of the GGUF file, milliseconds of a prompt and of a token after it (medians of
interleaved runs), and how many greedy tokens agree with transformers in fp32 (whose GGUF file has fp32 weights, too).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from llama_cpp import Llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune.export.gguf import to_gguf
from hf_prune.report.measure import interleaved

PROMPTS = (
    "The old house at the end of the street",
    "Water boils at a lower temperature on a mountain because",
    "Once upon a time there was a king who",
)


def opened(path: Path, threads: int) -> Llama:
    return Llama(str(path), n_ctx=512, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)


def greedy(llama: Llama, ids: list[int], count: int) -> list[int]:
    """The next tokens by llama.cpp."""
    llama.reset()
    return [token for token, _ in zip(llama.generate(ids, top_k=1, temp=0.0), range(count), strict=False)]


def agreeing(model: Any, llama: Llama, tokenizer: Any, count: int) -> tuple[int, int]:
    """(tokens alike before the first that differs, tokens asked for), over the prompts."""
    alike = 0
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        given = torch.tensor([ids])
        with torch.inference_mode():
            wanted = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, eos_token_id=None
            )[0, len(ids) :].tolist()
        found = greedy(llama, ids, count)
        alike += next((i for i, pair in enumerate(zip(wanted, found, strict=True)) if pair[0] != pair[1]), count)
    return alike, count * len(PROMPTS)


def seconds(llama: Llama, ids: list[int], count: int) -> dict[str, float]:
    """Of one prompt, and of a token after it."""
    llama.reset()
    started = time.perf_counter()
    llama.eval(ids)
    prompt = time.perf_counter() - started
    started = time.perf_counter()
    for token in ids[:count]:
        llama.eval([token])
    return {"prompt": prompt, "token": (time.perf_counter() - started) / count}


def main(line: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="directories of checkpoints, the dense one first")
    parser.add_argument("--out", type=Path, required=True, help="where the GGUF files go")
    parser.add_argument("--length", type=int, default=128, help="tokens of the prompt that is timed")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens to compare, and to time")
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args(line)
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    clocks = {}
    for directory in args.models:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        files = {t: to_gguf(model, args.out / f"{directory.name}-{t}.gguf", tokenizer, dtype=t, overwrite=True)
                 for t in ("f16", "f32")}  # fmt: skip
        alike, asked = agreeing(model, opened(files["f32"], torch.get_num_threads()), tokenizer, args.tokens)
        found[directory.name] = {"bytes": files["f16"].stat().st_size, "same_tokens": alike, "of": asked}
        ids = list(range(100, 100 + args.length))
        clocks[directory.name] = partial(seconds, opened(files["f16"], torch.get_num_threads()), ids, args.tokens)
    times = interleaved(clocks, args.runs, 2, "llama.cpp")
    first = next(iter(times.values()))
    for name, of in times.items():
        for what, taken in of.items():
            median = statistics.median(taken)
            tokens = args.length if what == "prompt" else 1
            found[name][f"{what}_tokens_per_second"] = round(tokens / median, 1)
            found[name][f"{what}_speedup"] = round(statistics.median(first[what]) / median, 3)
    found["settings"] = {"threads": torch.get_num_threads(), "length": args.length, "runs": args.runs}
    (args.out / "llama_cpp.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
