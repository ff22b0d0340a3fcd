"""What one prune() costs: time in forward and backward passes over the same calibration rows, and peak memory.

    make texts && python examples/cut_cost.py                  # MiniLM, SmolLM2-135M, a Llama of a billion parameters
    python examples/cut_cost.py --models minilm
    python examples/cut_cost.py --directory MODEL_DIR --task lm

Each in a process of its own. The pass that is the unit of time is that of training: all weights have gradients. The
peak is the resident set as the operating system counts it, sampled every 5 ms, above what it is before the call; it is
given in units of the weights. MiniLM is cut to half of its multiply-adds on 1,024 film reviews, SmolLM2 to 80% of its
block parameters on 16,384 tokens, the billion (random weights, bfloat16) on 4,096. Solves are the refits and the
inverses behind the scores; the rest are passes and sums over tokens. A JSON line each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from memory import peak_rss
from smollm2 import smollm2
from texts import calibration
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    default_data_collator,
)

from hf_prune import PruningConfig
from hf_prune.demo.real import minilm_path, reviews, tokenized
from hf_prune.model.batches import draw, forward_inputs
from hf_prune.oneshot import analyze
from hf_prune.repair import walk
from hf_prune.score import scoring
from hf_prune.score.losses import example_losses

CLASSIFIER = {"keep": 0.5, "metric": "macs", "shapes": "uniform", "sequence_length": 64}
LANGUAGE = {"keep": 0.8, "metric": "params", "units": ["neurons"], "sequence_length": 256}


@dataclass
class Case:
    """A model, its calibration data and how it is cut."""

    model: Any
    data: Any
    tokenizer: Any
    config: PruningConfig
    collator: Any = None


def classifier(directory: str, samples: int = 1024) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    data = tokenized(reviews(), tokenizer)["train"]
    return Case(model, data, tokenizer, PruningConfig(calibration_samples=samples, **CLASSIFIER))


def language(model: Any, tokenizer: Any, tokens: int = 16384) -> Case:
    config = PruningConfig(calibration_samples=4096, **LANGUAGE)
    return Case(model.eval(), calibration(tokenizer, tokens), tokenizer, config, default_data_collator)


def billion() -> Case:
    """Random weights: what it costs is real, what it loses is not."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=True, **sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.tie_weights()
    data = [{"input_ids": torch.randint(1000, (1, 512))} for _ in range(8)]
    return Case(model, data, None, PruningConfig(calibration_samples=8, **LANGUAGE))


CASES: dict[str, Callable[[], Case]] = {
    "minilm": lambda: classifier(str(minilm_path())),
    "smollm2": lambda: language(*smollm2(Path(".cache/smollm2"))),
    "billion": billion,
}


def forward_backward(model: Any, batches: Any) -> None:
    for batch in batches:
        example_losses(model, model(**forward_inputs(model, batch)), batch).mean().backward()
        model.zero_grad()


@contextlib.contextmanager
def counted(seconds: list[float], *functions: tuple[Any, str]) -> Iterator[None]:
    """Add up the time that functions of modules take."""
    before = [getattr(module, name) for module, name in functions]

    def timed(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[0] += time.perf_counter() - started

        return call

    for (module, name), function in zip(functions, before, strict=True):
        setattr(module, name, timed(function))
    try:
        yield
    finally:
        for (module, name), function in zip(functions, before, strict=True):
            setattr(module, name, function)


def measured(name: str, case: Case) -> dict[str, Any]:
    model, collator = case.model, case.collator
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    batches = draw(model, case.data, case.config.calibration_samples, 0, case.tokenizer, collator)
    with torch.no_grad():
        model(**forward_inputs(model, batches[0]))  # what a first pass loads is no part of pruning
    tokens = sum(next(iter(batch.inputs.values())).numel() for batch in batches)
    kept: list[Any] = []
    solves = [0.0]

    def score() -> None:
        tokenizer = case.tokenizer
        kept.append(analyze(model, case.data, case.config, processing_class=tokenizer, data_collator=collator))

    with counted(solves, (walk, "refit"), (scoring, "_score")):
        score_seconds, score_growth = peak_rss(score)
        cut_seconds, cut_growth = peak_rss(lambda: kept[0].cut_(model))
    row = {
        "model": name,
        "weights_mb": round(weights / 1e6),
        "tokens_with_padding": tokens,
        "criterion": kept[0].config.criterion,
        "score_seconds": round(score_seconds, 1),
        "cut_and_repair_seconds": round(cut_seconds, 1),
        "of_them_solves": round(solves[0], 1),
        "score_peak_above_weights": round(score_growth / weights, 2),
        "cut_peak_above_weights": round(cut_growth / weights, 2),
        "threads": torch.get_num_threads(),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES))
    parser.add_argument("--directory", help="of a model of your own, instead")
    parser.add_argument("--task", choices=("classification", "lm"), default="classification")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--unit", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.directory:
        print(json.dumps(measured(args.directory, own(args.directory, args.task)), indent=1))
    elif args.inside:
        print(json.dumps(measured(args.inside, CASES[args.inside]())))
    elif args.unit:
        print(json.dumps(unit(CASES[args.unit]())))
    else:
        for name in args.models.split(","):
            row = alone("--inside", name)
            passes = alone("--unit", name)
            total = row["score_seconds"] + row["cut_and_repair_seconds"]
            print(json.dumps(row | {"pass_seconds": passes, "prune_in_passes": round(total / passes, 2)}), flush=True)


def own(directory: str, task: str) -> Case:
    if task == "classification":
        return classifier(directory)
    return language(AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory))


def unit(case: Case) -> float:
    """Seconds of one forward and backward pass over the calibration rows, the less of two."""
    batches = draw(case.model, case.data, case.config.calibration_samples, 0, case.tokenizer, case.collator)
    return round(min(peak_rss(lambda: forward_backward(case.model, batches))[0] for _ in range(2)), 1)


def alone(*arguments: str) -> Any:
    """What this script prints in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
