"""Measured figures: exact sizes, interleaved timing, and tables that say the same twice."""

from __future__ import annotations

import copy
import io
import json

import pytest
import tiny
import torch
from rich.console import Console

import hf_prune
from hf_prune.model.probe import cache_argument, random_inputs
from hf_prune.report import measure as measuring
from hf_prune.report.measure import compare, directory_bytes, measure
from hf_prune.report.table import count, markdown, rich_table

SHAPES = ((1, 8), (2, 8))


def test_sizes_are_those_of_the_weights(family):
    model = tiny.tiny_model(family)
    found = measure(model, shapes=(), sequence_length=16)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert 0 < found["block_parameters"] < found["parameters"]
    assert 0 < found["block_macs"] <= found["macs"]
    assert found["bytes"] is None
    json.dumps(found)


def test_every_family_can_be_timed(family):
    model = tiny.tiny_model(family)
    (latency,) = measure(model, shapes=((2, 12),), runs=2, warmup=1)["latency"]
    assert (latency["batch"], latency["length"], latency["runs"]) == (2, 12, 2)
    assert 0 < latency["median_ms"] <= latency["p90_ms"]
    assert latency["speedup"] == 1.0


def test_a_directory_is_opened_and_weighed(tmp_path):
    model = tiny.tiny_model("bert")
    model.save_pretrained(tmp_path / "m")
    found = hf_prune.measure(tmp_path / "m", shapes=())
    assert found["bytes"] == directory_bytes(tmp_path / "m") > model.num_parameters() * 4
    assert 0 < found["load_seconds"] < 60
    assert found["resident_bytes"] > 0
    assert found["parameters"] == model.num_parameters()


def test_settings_say_what_was_measured():
    settings = measure(tiny.tiny_model("bert").bfloat16(), shapes=SHAPES[:1], runs=1, warmup=0)["settings"]
    assert settings["dtype"] == "bfloat16"
    assert settings["device"] == "cpu"
    assert settings["threads"] == torch.get_num_threads()
    assert settings["torch"] == torch.__version__


def test_models_are_measured_in_turn(monkeypatch):
    order = []
    models = {"a": tiny.tiny_model("bert"), "b": tiny.tiny_model("bert"), "c": tiny.tiny_model("bert")}
    names = {id(model): name for name, model in models.items()}

    def timed(model, **inputs):
        order.append(names[id(model)])
        return {"a": 2.0, "b": 1.0, "c": 4.0}[order[-1]]

    monkeypatch.setattr(measuring, "timed", timed)
    found = compare(models, shapes=SHAPES[:1], runs=5, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert [found[name]["latency"][0]["speedup"] for name in "abc"] == [1.0, 2.0, 0.5]


def test_median_and_p90():
    found = measuring.entry("forward", [i / 1000 for i in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)], 2, 8, [0.011])
    assert found["median_ms"] == pytest.approx(5.5)
    assert found["p90_ms"] == found["p99_ms"] == pytest.approx(100)
    assert found["speedup"] == pytest.approx(2.0)
    assert found["tokens_per_second"] == pytest.approx(16 / 0.0055)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"], indirect=True)
def test_what_generates_is_timed_token_by_token(family):
    model = tiny.tiny_model(family)
    found = measure(model, shapes=((2, 8),), runs=2, warmup=1, new_tokens=3)
    assert [entry["what"] for entry in found["latency"]] == ["forward", "prefill", "decode"]
    with torch.no_grad():
        cache = getattr(model(**random_inputs(model, 1, 5), use_cache=True), cache_argument(model))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found["kv_cache_bytes"] == held / 5


def test_what_is_slower_is_said_with_the_reason():
    model = tiny.tiny_model("bert", intermediate_size=1024 + 3)
    at = {"what": "forward", "batch": 1, "length": 8}
    fast, slow = ({**at, "speedup": speedup} for speedup in (1.2, 0.8))
    assert measuring._notes([fast], hf_prune.describe(model), "cpu") == []
    (note,) = measuring._notes([fast, slow], hf_prune.describe(model), "cpu")
    assert "slower than the first model at forward 1 x 8" in note
    assert "[1027] are not multiples of 32" in note


def test_measuring_leaves_the_model_as_it_was():
    model = tiny.tiny_model("bert").train()
    before = copy.deepcopy(model.state_dict())
    measure(model, shapes=SHAPES, runs=1, warmup=0)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_inputs_are_full_and_the_same_every_time():
    model = tiny.tiny_model("bert")
    first, second = random_inputs(model, 3, 9), random_inputs(model, 3, 9)
    assert first["input_ids"].shape == (3, 9)
    assert first["attention_mask"].all()
    assert len(first["input_ids"].unique()) > 5
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tables_say_the_same_twice():
    rows = [{"model": "dense", "MACs": "1"}, {"model": "small", "speed": "2×"}]
    assert markdown(rows).splitlines() == [
        "| model | MACs | speed |",
        "| :-- | --: | --: |",
        "| dense | 1 | – |",
        "| small | – | 2× |",
    ]
    screen = Console(width=60, record=True, file=io.StringIO())
    screen.print(rich_table(rows))
    shown = screen.export_text()
    assert all(word in shown for word in ("model", "dense", "2×", "–"))


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1234, "1.23k"), (22.7e6, "22.7M"), (7e9, "7G")])
def test_count(number, text):
    assert count(number) == text
