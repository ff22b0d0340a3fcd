"""The benchmark harness on tiny models: cells, resuming, peers, tables. Its real run is `make benchmark`."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import tiny
import tiny_text
import torch
from datasets import Dataset
from transformers import default_data_collator

from hf_prune import describe

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path += [str(EXAMPLES / "benchmark"), str(EXAMPLES)]

import cloze  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
from methods import METHODS, Method, dense, hf_prune  # noqa: E402
from peers import optipfair, torch_pruning  # noqa: E402
from tasks import Settings, Task  # noqa: E402

SETTINGS = Settings(keeps=(0.7,), seeds=(0,), length=12, calibration=16, latency=((1, 12),), runs=1)
OURS = (
    Method("dense", dense, keeps=(1.0,)),
    Method("hf_prune stock", hf_prune(shapes="stock"), note="the default"),
    Method("the same", hf_prune()),
    Method("random", hf_prune(criterion="random", repair="none", shapes="uniform")),
    Method("impossible", hf_prune(), keeps=(0.01,)),
)


def task(family="bert"):
    """Tiny BERT, or Llama with the head counts of SmolLM2: Torch-Pruning 1.6.1 does not return on 4 heads and 2 KV."""
    wide = {"intermediate_size": 512}
    if family == "llama":
        wide |= {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
    model = tiny.tiny_model(family, "LlamaForCausalLM" if family == "llama" else None, **wide)
    batch = tiny.tiny_batch(model, batch=16, padded=False)
    rows = Dataset.from_dict({key: value.tolist() for key, value in batch.items() if value.dim()})
    fields = {"sequence_length": 12, "calibration_samples": 16, "metric": "params" if family == "llama" else "macs"}

    def evaluate(pruned):
        pruned(**batch)
        return {"accuracy": 0.5, "right": "01" * 8}

    return Task(family, 0, model, None, rows, fields, evaluate, collator=default_data_collator)


def cells(out, wanted):
    return {cell["method"]: cell for cell in run.read(out) if cell["method"] in wanted}


@pytest.mark.filterwarnings("ignore:.*calibration tokens to refit")
def test_cells_are_written_once_and_tell_what_failed(tmp_path, monkeypatch):
    run.run_task(task(), OURS, SETTINGS, tmp_path)
    found = cells(tmp_path, [method.name for method in OURS])
    assert set(found) == {method.name for method in OURS}
    assert "keep=0.01" in found["impossible"]["error"]
    assert found["the same"]["same_as"] == "hf_prune stock"
    for name in ("hf_prune stock", "random"):
        assert found[name]["kept"] <= 0.7
        assert found[name]["latency"][0]["speedup"] > 0
    monkeypatch.setattr(run, "_measured", lambda *_: pytest.fail("measured again"))
    run.run_task(task(), OURS, SETTINGS, tmp_path)
    with pytest.raises(SystemExit, match="another --out"):
        run.run_task(task(), OURS, Settings(**{**vars(SETTINGS), "calibration": 8}), tmp_path)
    text = tables.write_tables(run.read(tmp_path), tmp_path / "tables.md")
    assert "| hf_prune stock | **0.0 ± 0.0** |" in text
    assert "- hf_prune stock: the default." in text


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("importance", ["GroupMagnitudeImportance", "GroupTaylorImportance"])
def test_torch_pruning_runs_and_meets_keep(tmp_path, family, importance):
    row = Method("peer", torch_pruning(importance))
    run.run_task(task(family), [row], SETTINGS, tmp_path)
    (cell,) = run.read(tmp_path)
    assert "error" not in cell, cell["error"]
    assert 0.55 < cell["kept"] <= 0.7


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_torch_pruning_cuts_like_a_mask(family):
    """What it gives is the dense model with zeroed columns: heads, KV sharing and neurons still belong together."""
    given = task(family)
    masked, pruned = copy.deepcopy(given.model), copy.deepcopy(given.model)
    torch_pruning("GroupMagnitudeImportance")(given).cut(pruned, 0.7)
    for site in describe(masked).sites:
        wide, narrow = (m.get_submodule(f"{site.path}.{site.consumer}").weight.data for m in (masked, pruned))
        gone = [i for i in range(wide.shape[1]) if not (wide[:, i : i + 1] == narrow).all(0).any()]
        assert len(gone) == wide.shape[1] - narrow.shape[1]
        wide[:, gone] = 0
    inputs = tiny.tiny_batch(masked, batch=4, padded=False)
    torch.testing.assert_close(pruned(**inputs).logits, masked(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "with_data"), [("llama", False), ("llama", True), ("bert", False)])
def test_optipfair_runs_where_it_can(tmp_path, family, with_data):
    run.run_task(task(family), [Method("peer", optipfair("MAW", with_data))], SETTINGS, tmp_path)
    (cell,) = run.read(tmp_path)
    if family == "bert":
        assert "not compatible with GLU pruning" in cell["error"]
    else:
        assert 0.6 < cell["kept"] <= 0.7


def test_paired_errors_and_marks():
    def cell(method, seed, right):
        return {"method": method, "seed": seed, "right": right, "keep": 1.0 if method == "dense" else 0.5, "task": "t"}

    some = [cell("dense", 0, "1111"), cell("a", 0, "1110"), cell("b", 0, "1100"), cell("c", 0, "0000")]
    (a, b, c) = tables.drop_table(some)
    assert (a["50%"], b["50%"], c["50%"]) == ("**25.0 ± 25.0**", "50.0 ± 28.9 *", "100.0 ± 0.0")
    two = [cell("dense", 1, "1111"), cell("a", 1, "0111")]
    assert tables.paired([some[0], two[0]], [some[1], two[1]]) == [0.5, 0, 0, 0.5]


def test_cloze_items_come_from_the_text():
    tokenizer = tiny_text.tokenizer()
    tokenizer.decode = lambda ids: " " + str(ids[0])
    text = " ".join(tiny_text.WORDS[i * 7 % 94] for i in range(4000))
    found = cloze.items(tokenizer, text, 6)
    assert all(len(item.context) == cloze.CONTEXT and len(item.choices) == 4 for item in found)
    assert all(len(choice) == cloze.CONTINUATION for item in found for choice in item.choices)
    right = cloze.correctness(tiny.tiny_model("llama", "LlamaForCausalLM"), found)
    assert len(right) == 6
    assert set(right) <= set("01")


def test_every_row_is_named_once_a_task():
    pairs = [(method.name, name) for method in METHODS for name in method.tasks]
    assert len(pairs) == len(set(pairs))


def test_settings_are_json(tmp_path):
    assert run.signature(SETTINGS) == json.loads(json.dumps(run.signature(SETTINGS)))
