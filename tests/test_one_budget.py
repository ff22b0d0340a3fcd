"""The examples of layers and of one budget, on tiny models. Their real runs take an hour: see their first lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_tokens import model_for
from test_vocabulary import bert, qwen, sentences

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES / "benchmark"), str(EXAMPLES)]

import depth  # noqa: E402
import experts  # noqa: E402
import one_budget  # noqa: E402
import small_encoder  # noqa: E402
import width  # noqa: E402
from tasks import Task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit", "ignore:.*remains, where keep=")


def shown(capsys):
    """The JSON lines; a Trainer prints lines of its own between them."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"')]


@pytest.fixture
def reviews(monkeypatch):
    """Both scripts on 64 sentences with labels, and a tiny BERT in place of the fine-tuned MiniLM."""
    texts = sentences(64, seed=3)
    data = {part: {"text": texts, "label": [i % 2 for i in range(64)]} for part in ("train", "validation")}

    def classifier(name, settings, cache, seed):
        tokenizer = bert()
        model = model_for("bert", "BertForSequenceClassification", tokenizer, max_position_embeddings=80)
        rows = Dataset.from_dict({**tokenizer(texts, truncation=True, max_length=32), "labels": data["train"]["label"]})
        fields = {"sequence_length": 12, "calibration_samples": 64, "align": 4}
        training = {"num_train_epochs": 1, "per_device_train_batch_size": 32}
        return Task(name, seed, model, tokenizer, rows, fields, lambda model: {"accuracy": 0.5}, training=training)

    for script in (small_encoder, one_budget, width):
        monkeypatch.setattr(script, "classifier", classifier)
        monkeypatch.setattr(script, "reviews", lambda source: data, raising=False)


def test_a_small_encoder(reviews, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_encoder.py", "--seeds", "0", "--min-count", "2"])
    small_encoder.main()
    *rows, _ = shown(capsys)
    sizes = {row["model"]: row["parameters"] for row in rows if "parameters" in row}
    assert sizes["per layer + vocabulary"] < min(sizes["per layer"], sizes["vocabulary >= 2"]) < sizes["dense"]
    assert sizes["three layers"] < sizes["dense"]
    assert all(row["int8_bytes"] > 0 for row in rows if "+ vocabulary" in row["model"] and "seed" in row)


def test_one_budget(reviews, monkeypatch, capsys, tmp_path):
    picture = tmp_path / "sizes.png"
    given = ["one_budget.py", "--seeds", "0", "--keeps", "0.8,0.2", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", given)
    one_budget.main()
    rows = shown(capsys)
    whole = next(row["bytes"] for row in rows if row["units"] == "dense")
    reached = {row["units"] for row in rows if row["keep"] == 0.8 and "accuracy" in row}
    assert "together" in reached
    assert any("cannot be reached" in row.get("error", "") for row in rows if row["keep"] == 0.2)
    assert all(row["bytes"] <= row["keep"] * whole for row in rows if "accuracy" in row)
    assert picture.stat().st_size > 5000


def test_a_narrower_encoder(reviews, monkeypatch, capsys):
    units = ["--units", "channels,channels and neurons"]
    monkeypatch.setattr(sys, "argv", ["width.py", "--part", "encoder", "--seeds", "0", "--rows", "64", *units])
    width.main()
    rows = [row for row in shown(capsys) if "seed" in row]
    assert [row["model"] for row in rows][:3] == ["dense", "channels", "channels, one epoch"]
    assert rows[1]["sizes"][0] < rows[0]["sizes"][0]
    assert all(row["macs"] <= 0.5 for row in rows[1:])


@pytest.fixture
def language_model(monkeypatch):
    """The scripts of language models on a tiny Llama and random tokens."""
    tokenizer = qwen()
    model = model_for("llama", "LlamaForCausalLM", tokenizer, num_hidden_layers=4, max_position_embeddings=64)
    ids = torch.randint(len(tokenizer), (16, 16), generator=torch.Generator().manual_seed(0)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 16] * 16})
    values = {
        "smollm2": lambda cache: (model, tokenizer),
        "brown": lambda: iter([]),
        "austen": lambda: iter([]),
        "evaluation": lambda tokenizer, texts, windows: ids[:4],
        "calibration": lambda tokenizer, tokens, sources: rows,
    }
    for script in (depth, width):
        for name, value in values.items():
            monkeypatch.setattr(script, name, value)
    for name, value in {"PROMPT": 8, "DECODED": 2}.items():
        monkeypatch.setattr(depth, name, value)


def test_a_narrower_decoder(language_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["width.py", "--part", "decoder", "--keep", "0.7"])
    width.main()
    rows = shown(capsys)
    cut = [row for row in rows if "keep" in row]
    assert [row["model"] for row in cut] == list(width.STREAMS)
    assert cut[0]["hidden"] < rows[0]["hidden"]
    assert cut[2]["hidden"] == rows[0]["hidden"]
    assert all(row["keep"] <= 0.7 for row in cut)
    assert sum("forward_cpu" in row for row in rows) == 3


def test_layers_and_neurons(language_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["depth.py", "--keeps", "0.7", "--picture", str(tmp_path / "depth.png")])
    depth.main()
    whole, *cut = shown(capsys)
    assert whole["perplexity_brown"] > 0
    assert [row["units"] for row in cut] == list(depth.UNITS)
    assert next(row["layers"] for row in cut if row["units"] == "layers") < 4
    assert all(row["kept"] <= 0.7 and row["forward_cpu"] > 0 and row["decode_cpu"] > 0 for row in cut)
    assert (tmp_path / "depth.png").exists()


@pytest.mark.filterwarnings("ignore:.*see fewer than 32 calibration tokens")
def test_half_of_the_experts(monkeypatch, capsys, tmp_path):
    """A mixture trained for two steps on sentences, cut in every way, plainly and refitted."""
    small = {"HOME": tmp_path / "mixture", "SOURCES": (lambda: iter(sentences(400, seed=1)),)}
    small |= {"STEPS": 2, "BATCH": 4, "LENGTH": 16, "VOCABULARY": 300, "ROWS": 32}
    for name, value in small.items():
        monkeypatch.setattr(experts, name, value)
    monkeypatch.setattr(sys, "argv", ["experts.py", "--seeds", "0"])
    experts.main()
    dense, *cut = (row for row in shown(capsys) if "way" in row)
    assert dense["way"] == "dense"
    assert {row["way"] for row in cut} == {*experts.WAYS, "merged into REAP's"}
    assert len(cut) == 2 * (len(experts.WAYS) + 1)
    assert all(1 < row["perplexity"] < 400 for row in cut)
