"""The demo, end to end on a few rows of the real data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny
import tiny_text

from hf_prune.demo import finetune
from hf_prune.demo.run import RELOAD, _rows


def entry(**changes):
    latency = [{"median_ms": 4.0, "speedup": 1.0}, {"median_ms": 40.0, "speedup": 2.0}]
    base = {"accuracy": 0.8, "rows": 64, "parameters": 2e6, "macs": 3e8, "bytes": 8e6, "latency": latency}
    return {**base, "opened_by": "plain transformers", **changes}


def test_the_table_has_a_column_a_model():
    rows = _rows({"dense": entry(), "stock": entry(macs=1.5e8)})
    cells = {row[""]: row for row in rows}
    assert all(set(row) == {"", "dense", "stock"} for row in rows)
    assert cells["MACs, 64 tokens"]["stock"] == "150M (50%)"
    assert cells["latency, batch 32 × 64"]["dense"] == "40.0 ms (2.00×)"


def test_the_fine_tuned_model_is_cached(tmp_path, monkeypatch):
    tiny.tiny_model("bert").save_pretrained(tmp_path / "tuned")
    tiny_text.tokenizer().save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(finetune, "_train", lambda *_: pytest.fail("trained again"))
    model, tokenizer = finetune.finetuned(tmp_path, {}, tmp_path / "tuned")
    assert not model.training
    assert len(tokenizer) == 99


@pytest.mark.parametrize(("shapes", "door", "opens"), [
    ("stock", "plain", True),
    ("per_layer", "hf_prune", True),
    ("per_layer", "plain", False),  # fails loudly, so that "plain" proves what it says
])  # fmt: skip
def test_a_process_that_knows_only_the_directory_scores_it(tmp_path, shapes, door, opens):
    tiny.cut_tiny("BertForSequenceClassification", shapes).save_pretrained(tmp_path / "m")
    tiny_text.tokenizer().save_pretrained(tmp_path / "m")
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(tiny_text.sentences(20))]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows, "max_length": 16}))
    command = [sys.executable, str(RELOAD), str(tmp_path / "m"), str(tmp_path / "rows.json"), door]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) is opens
    if opens:
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["opened_with"] == door
        assert 0 <= found["accuracy"] <= 1


@pytest.mark.slow
def test_demo_quick(tmp_path, capsys):
    from hf_prune.cli.main import main

    out, cache = tmp_path / "out", tmp_path / "cache"
    assert main(["demo", "--quick", "--out", str(out), "--cache", str(cache)]) == 0
    shown = capsys.readouterr().out
    table = json.loads((out / "table.json").read_text())["models"]
    assert list(table) == ["dense", "stock", "uniform", "per_layer"]
    assert [model["opened_with"] for model in table.values()] == ["plain", "plain", "hf_prune", "hf_prune"]
    for name, model in table.items():
        assert (out / name / "tokenizer.json").exists()
        assert model["macs"] <= (1 if name == "dense" else 0.5) * table["dense"]["macs"]
        assert all(line in shown for line in model["lines"])
