"""What one prune() costs: time against forward+backward passes over the same calibration rows, and peak memory.

    python examples/cut_cost.py MODEL_DIR --task classification|lm

Memory is the resident set, sampled every 5 ms; "states" are the cached hidden states of the calibration rows (dense and
pruned stream, and three targets of one layer), counted from their sizes.
"""

from __future__ import annotations

import argparse
import json

import torch
from memory import peak_rss
from texts import calibration
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, default_data_collator

from hf_prune import PruningConfig
from hf_prune.demo.real import reviews, tokenized
from hf_prune.model.batches import draw, forward_inputs
from hf_prune.oneshot import analyze
from hf_prune.score.losses import example_losses


def forward_backward(model, batches) -> None:
    for batch in batches:
        example_losses(model, model(**forward_inputs(model, batch)), batch).mean().backward()
        model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", choices=("classification", "lm"), default="classification")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--criterion", default=None)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.task == "lm":
        model = AutoModelForCausalLM.from_pretrained(args.model).eval()
        data, collator = calibration(tokenizer, 256 * args.samples), default_data_collator
    else:
        model = AutoModelForSequenceClassification.from_pretrained(args.model).eval()
        data, collator = tokenized(reviews(), tokenizer)["train"], None
    config = PruningConfig(
        keep=args.keep,
        metric="params" if args.task == "lm" else "macs",
        shapes="stock" if args.task == "lm" else "uniform",
        calibration_samples=args.samples,
        sequence_length=64,
        criterion=args.criterion,
    )
    batches = draw(model, data, args.samples, 0, tokenizer, collator)
    tokens = sum(next(iter(b.inputs.values())).numel() for b in batches)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    pass_seconds = min(peak_rss(lambda: forward_backward(model, batches))[0] for _ in range(2))
    kept: list = []
    score_seconds, score_growth = peak_rss(
        lambda: kept.append(analyze(model, data, config, processing_class=tokenizer, data_collator=collator))
    )
    analysis = kept[0]
    cut_seconds, cut_growth = peak_rss(lambda: analysis.cut_(model))
    states = 5 * tokens * model.config.hidden_size * 4
    print(
        json.dumps(
            {
                "model_bytes": weights,
                "layers": model.config.num_hidden_layers,
                "calibration_tokens_with_padding": tokens,
                "criterion": analysis.config.criterion,
                "forward_backward_seconds": round(pass_seconds, 2),
                "score_seconds": round(score_seconds, 2),
                "cut_and_repair_seconds": round(cut_seconds, 2),
                "prune_in_passes": round((score_seconds + cut_seconds) / pass_seconds, 2),
                "score_peak_over_model": round(1 + score_growth / weights, 2),
                "cut_peak_over_model": round(1 + cut_growth / weights, 2),
                "states_over_model": round(states / weights, 2),
                "threads": torch.get_num_threads(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
