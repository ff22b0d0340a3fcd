"""Half of the experts of a small mixture, by several criteria, merged, and with narrower experts instead.

    make texts && python examples/experts.py            # trains the mixture once (minutes), then cuts it: on two cores
    python examples/experts.py --seeds 0

The mixture is trained here, so that its accuracy means something: a Qwen3-MoE of four layers with 16 experts each, of
which every token goes through two, on five kinds of text. It is cut to half of its experts, with and without the refit,
calibrated on rows that it was trained on, and read on others: perplexity, and how often the next token is right. A JSON
line each (mean over calibration draws), and a table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from texts import austen, brown, docstrings, film_reviews, news
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, default_data_collator
from transformers.optimization import get_cosine_schedule_with_warmup

from hf_prune import PruningConfig, PruningPlan, describe, execute, prune
from hf_prune.model.batches import draw
from hf_prune.model.cut import cut_
from hf_prune.model.experts import Call, contributions
from hf_prune.oneshot import analyze
from hf_prune.repair import walk

HOME = Path(".cache/experts")
SOURCES = (austen, brown, film_reviews, news, docstrings)
LENGTH, BATCH, STEPS, EACH = 128, 32, 500, 1_000_000  # tokens of a row, rows of a step, steps, letters of a source
VOCABULARY, WORST = 4096, 1e30
ROWS = 256  # that calibrate
WAYS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random", "units": ["experts"]},
    "frequency": {"criterion": "frequency", "units": ["experts"]},
    "REAP": {"criterion": "reap", "units": ["experts"]},
    "Fisher": {"criterion": "fisher", "units": ["experts"]},
    "OBS": {"criterion": "hessian", "units": ["experts"]},
    "narrower": {"units": ["neurons"]},
}


def texts() -> list[str]:
    """Pieces of all sources, as many letters of each."""
    found = []
    for source in SOURCES:
        letters = "\n\n".join(itertools.islice(source(), 400))[:EACH]
        found += [letters[start : start + 2000] for start in range(0, len(letters), 2000)]
    random.Random(0).shuffle(found)
    return found


def windows(tokenizer: Any, pieces: Sequence[str]) -> list[list[int]]:
    ids = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
    return [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]


def new_tokenizer(pieces: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def mixture() -> tuple[Any, Any, list[list[int]], list[list[int]]]:
    """The trained mixture, its tokenizer, the rows that it was trained on, and others."""
    pieces = texts()
    learned, kept_back = pieces[: len(pieces) * 9 // 10], pieces[len(pieces) * 9 // 10 :]
    if not (HOME / "config.json").exists():
        tokenizer = new_tokenizer(learned)
        model = trained(windows(tokenizer, learned))
        tokenizer.save_pretrained(HOME)
        model.save_pretrained(HOME)
    model, tokenizer = Qwen3MoeForCausalLM.from_pretrained(HOME), PreTrainedTokenizerFast.from_pretrained(HOME)
    return model.eval(), tokenizer, windows(tokenizer, learned), windows(tokenizer, kept_back)


def trained(rows: list[list[int]]) -> Any:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=192, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=128, tie_word_embeddings=True,
        output_router_logits=True, router_aux_loss_coef=0.01, norm_topk_prob=True, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 20, STEPS)
    started = time.perf_counter()
    for step, ids in enumerate(itertools.islice(drawn(rows), STEPS)):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(json.dumps({"step": step, "loss": round(loss.item(), 3), "s": round(time.perf_counter() - started)}))
    model.config.output_router_logits = False
    return model


def drawn(rows: list[list[int]]) -> Iterator[torch.Tensor]:
    order = random.Random(0)
    while True:
        yield torch.tensor(order.sample(rows, BATCH))


@torch.inference_mode()
def read(model: Any, rows: list[list[int]]) -> dict[str, float]:
    """Perplexity, and the share of next tokens that are right."""
    loss, right, count = 0.0, 0, 0
    for start in range(0, len(rows), BATCH):
        ids = torch.tensor(rows[start : start + BATCH])
        logits, wanted = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += len(wanted)
    return {"perplexity": math.exp(loss / count), "accuracy": right / count}


# --- experts merged into those that stay ------------------------------------------------------------------------------


@contextlib.contextmanager
def merging(model: Any, data: Dataset) -> Iterator[None]:
    """Before a layer of experts is cut, every expert that goes is averaged into the kept one whose outputs are most
    like its own, weighed by how many tokens see them, its neurons in the order of that one's (after REAM and M-SMoE).
    """
    calls: dict[str, list[Call]] = {}
    for site in (site for site in describe(model).sites if site.routed):
        module, seen = model.get_submodule(f"{site.path}.{site.consumer}"), calls.setdefault(site.name, [])
        module.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(Call.of(given)))
    with torch.no_grad():
        for batch in draw(model, data, ROWS, 0, None, default_data_collator):
            model(**batch.inputs)

    def merged_and_cut(layer: Any, site: Any, axis: str, kept: Sequence[int]) -> None:
        if site.routed:
            merge_(layer.get_submodule(site.consumer), calls[site.name], kept)
        cut_(layer, site, axis, kept)

    with mock.patch.object(walk, "cut_", merged_and_cut), mock.patch.object(execute, "cut_", merged_and_cut):
        yield


@torch.no_grad()
def merge_(module: Any, calls: Sequence[Call], kept: Sequence[int]) -> None:
    experts = len(module.down_proj)
    seen = torch.bincount(torch.cat([call.index.flatten() for call in calls]), minlength=experts).float()
    everywhere = [every_expert(module, call.hidden[:256]) for call in calls[:8]]
    outputs = torch.nn.functional.normalize(torch.cat(everywhere, 1).flatten(1), dim=1)  # [E, n*D]
    likeness = outputs @ outputs.T
    up, down = module.gate_up_proj.clone(), module.down_proj.clone()
    for home in kept:
        group = [e for e in range(experts) if e == home or (e not in kept and nearest(likeness, e, kept) == home)]
        shares = (seen[group] / seen[group].sum().clamp_min(1)).tolist()
        members = [(s, e, matching(up, down, home, e)) for s, e in zip(shares, group, strict=True)]
        module.gate_up_proj[home] = sum(s * up[e][torch.cat([o, o + len(o)])] for s, e, o in members)
        module.down_proj[home] = sum(s * down[e][:, o] for s, e, o in members)


def every_expert(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What each expert would make of all tokens, [E, n, D]."""
    index = torch.arange(len(module.down_proj)).expand(len(hidden), -1)
    return contributions(module, Call(hidden, index, torch.ones(index.shape))).transpose(0, 1)


def nearest(likeness: torch.Tensor, expert: int, kept: Sequence[int]) -> int:
    return kept[int(likeness[expert, list(kept)].argmax())]


def matching(up: torch.Tensor, down: torch.Tensor, home: int, expert: int) -> torch.Tensor:
    """The neurons of an expert in the order of those of another that they are most like, best pairs first."""

    def neurons(e: int) -> torch.Tensor:
        gate, value = up[e].chunk(2)
        return torch.nn.functional.normalize(torch.cat([gate, value, down[e].T], 1), dim=1)

    likeness = neurons(home) @ neurons(expert).T
    order = torch.empty(len(likeness), dtype=torch.long)
    for _ in range(len(likeness)):
        mine, other = divmod(int(likeness.argmax()), len(likeness))
        order[mine] = other
        likeness[mine], likeness[:, other] = -WORST, -WORST
    return order


# --- the table --------------------------------------------------------------------------------------------------------


def cuts(model: Any, data: Dataset, seed: int) -> Iterator[tuple[str, str, Any]]:
    """Every way, plainly cut and refitted."""
    experts = [site for site in describe(model).sites if site.routed]
    keep = 1 - sum(site.elements(site.sizes) for site in experts) / 2 / sum(p.numel() for p in model.parameters())
    for way, options in WAYS.items():
        config = PruningConfig(
            keep=keep + 0.005,
            metric="params",
            scope="model",
            calibration_samples=ROWS,
            calibration_seed=seed,
            **options,
        )
        plan = analyze(model, data, config, data_collator=default_data_collator).plan()
        for repair in ("none", "least_squares"):
            yield way, repair, cut(model, data, config, plan, repair)
            if way == "REAP":
                with merging(copy.deepcopy(model), data):
                    yield "merged into REAP's", repair, cut(model, data, config, plan, repair)


def cut(model: Any, data: Dataset, config: PruningConfig, plan: PruningPlan, repair: str) -> Any:
    small = copy.deepcopy(model)
    options = config.to_dict() | {"repair": repair}
    prune(small, data, PruningConfig.from_dict(options), plan=plan, data_collator=default_data_collator)
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration draws")
    args = parser.parse_args()
    model, _, learned, others = mixture()
    dense = read(model, others)
    print(json.dumps({"way": "dense", **dense, "parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in args.seeds:
        rows = random.Random(seed).sample(learned, 2 * ROWS)
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * len(rows)})
        for way, repair, small in cuts(model, data, seed):
            found.setdefault((way, repair), []).append(read(small, others))
            print(json.dumps({"way": way, "repair": repair, "seed": seed, **found[way, repair][-1]}), flush=True)
    print(f"\n| half of the experts | plain cut | refitted |\n|---|--:|--:|\n| dense | {cell([dense])} | |")
    for way in dict.fromkeys(way for way, _ in found):
        print(f"| {way} | {cell(found[way, 'none'])} | {cell(found[way, 'least_squares'])} |")


def cell(values: Sequence[dict[str, float]]) -> str:
    perplexity, accuracy = (statistics.mean(each[key] for each in values) for key in ("perplexity", "accuracy"))
    return f"{perplexity:.1f} ({accuracy:.1%})"


if __name__ == "__main__":
    main()
