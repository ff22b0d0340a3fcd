"""The earlier plan travels with the model, whichever way that goes, and another model's plan is never taken for it."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from hub_server import Hub
from tiny import FAMILY_NAMES, cut_everywhere, cut_tiny, distance, outputs, rows, tiny_batch, tiny_model

from hf_prune import PruningConfig, PruningPlan, describe, prune, save_pretrained
from hf_prune.checkpoint.history import PLAN_FILE, REPORT_FILE, history_of, pack, unpack
from hf_prune.plan import Kept

CLASS = transformers.BertForSequenceClassification
AGAIN = PruningConfig(keep=0.9, shapes="per_layer", repair="none", align=1, criterion="magnitude")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model cut once, what it gave, its plan into the dense model, and where it was saved."""
    model = cut_tiny(CLASS.__name__, "per_layer")
    home = tmp_path_factory.mktemp("made") / "small"
    save_pretrained(model, home)
    return model, model._hf_prune.plan, home


def opened(directory):
    return CLASS.from_pretrained(directory).eval()


def cut_again(model):
    return prune(model, [tiny_batch(model)], AGAIN).plan


# --- the ways that a model goes --------------------------------------------------------------------------------------


def moved(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "first")
    model = opened(tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "renamed")
    return model


def relative(home, tmp_path, monkeypatch):
    shutil.copytree(home, tmp_path / "a/first")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model = opened("first")
    monkeypatch.chdir(tmp_path / "b")
    return model


def removed(home, tmp_path, monkeypatch):
    model = moved(home, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "renamed")
    return model


def stock_save(home, tmp_path, monkeypatch):
    opened(home).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / PLAN_FILE).exists()
    return opened(tmp_path / "plain")


def two_stock_saves(home, tmp_path, monkeypatch):
    stock_save(home, tmp_path, monkeypatch).save_pretrained(tmp_path / "again")
    return opened(tmp_path / "again")


def only_weights(home, tmp_path, monkeypatch):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(home / name, tmp_path / "bare")
    return opened(tmp_path / "bare")


def from_config(home, tmp_path, monkeypatch):
    model = CLASS(transformers.AutoConfig.from_pretrained(home))
    model.load_state_dict(opened(home).state_dict())
    return model.eval()


def copied(home, tmp_path, monkeypatch):
    return copy.deepcopy(opened(home))


def pickled(home, tmp_path, monkeypatch):
    return pickle.loads(pickle.dumps(opened(home)))


def saved_without_a_cut(home, tmp_path, monkeypatch):
    save_pretrained(opened(home), tmp_path / "same")
    return opened(tmp_path / "same")


def through_an_auto_class(home, tmp_path, monkeypatch):
    return transformers.AutoModelForSequenceClassification.from_pretrained(home).eval()


def by_its_state(home, tmp_path, monkeypatch):
    """The config as a dict, and the weights, into a new object."""
    model = opened(home)
    fresh = CLASS(CLASS.config_class.from_dict(json.loads(model.config.to_json_string(use_diff=True))))
    fresh.load_state_dict(model.state_dict())
    return fresh.eval()


ROUTES = (
    moved, relative, removed, stock_save, two_stock_saves, only_weights, from_config, copied, pickled,
    saved_without_a_cut, through_an_auto_class, by_its_state,
)  # fmt: skip


@pytest.mark.parametrize("route", ROUTES, ids=[route.__name__ for route in ROUTES])
def test_the_plan_comes_along(made, tmp_path, monkeypatch, route):
    model, plan, home = made
    found = route(home, tmp_path, monkeypatch)
    assert history_of(found).plan.kept == plan.kept
    assert distance(outputs(found, tiny_batch(model)), outputs(model, tiny_batch(model))) <= 1e-5
    then = cut_again(found)
    assert found._hf_prune.plan.kept == plan.compose(then).kept
    assert found.config.hf_prune["plan"] == plan.compose(then).hash
    assert found.config.hf_prune["before"] == model.config.hf_prune["before"]  # of the dense model
    save_pretrained(found, tmp_path / "twice")
    assert PruningPlan.load(tmp_path / "twice" / PLAN_FILE).kept == plan.compose(then).kept
    assert history_of(opened(tmp_path / "twice")).plan.hash == plan.compose(then).hash


def test_the_composed_plan_cuts_the_dense_model_to_the_same(made, tmp_path):
    """What is remembered is right: one cut by it gives what two cuts gave."""
    _, _, home = made
    found = opened(home)
    cut_again(found)
    dense = tiny_model("bert")
    prune(dense, [tiny_batch(dense)], PruningConfig(repair="none"), plan=found._hf_prune.plan)
    assert distance(outputs(dense, tiny_batch(dense)), outputs(found, tiny_batch(dense))) <= 1e-5


@pytest.mark.parametrize("route", [saved_without_a_cut, copied, through_an_auto_class], ids=lambda r: r.__name__)
def test_a_save_without_a_cut_keeps_plan_and_reports(made, tmp_path, monkeypatch, route):
    _, _, home = made
    save_pretrained(route(home, tmp_path, monkeypatch), tmp_path / "out")
    for name in (PLAN_FILE, REPORT_FILE):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((home / name).read_text())


def test_a_save_after_a_stock_save_keeps_the_plan(made, tmp_path, monkeypatch):
    _, plan, home = made
    save_pretrained(stock_save(home, tmp_path, monkeypatch), tmp_path / "out")
    assert PruningPlan.load(tmp_path / "out" / PLAN_FILE).hash == plan.hash


def test_a_llama_saved_as_mistral_still_knows_its_plan(tmp_path):
    model = cut_tiny("LlamaForCausalLM", "uniform")
    save_pretrained(model, tmp_path / "mistral", model_type="mistral")
    found = transformers.MistralForCausalLM.from_pretrained(tmp_path / "mistral")
    assert history_of(found).plan.kept == model._hf_prune.plan.kept
    prune(found, [tiny_batch(found)], AGAIN)
    assert len(found._hf_prune.plan.kept) == len(model._hf_prune.plan.kept)


OPEN = """
import json, warnings
import hf_prune
from transformers import BertForSequenceClassification
from hf_prune.checkpoint.history import history_of
warnings.simplefilter("error")
model = BertForSequenceClassification.from_pretrained("me/small").eval()
history = history_of(model)
print(json.dumps([history.plan.hash, len(history.cuts)]))
"""


def test_the_plan_is_found_through_the_hub(made, tmp_path):
    """By the Hub's own look-up and cache; and by the config alone where only the weights are in the cache."""
    _, plan, home = made
    with Hub() as hub:
        hub.repos["me/small"] = {"main": {path.name: path.read_bytes() for path in home.iterdir()}}
        known = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        env = {**known, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command, found = [sys.executable, "-c", OPEN], []
        for changes in ({}, {"HF_HUB_OFFLINE": "1"}):
            done = subprocess.run(command, env={**env, **changes}, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            found.append(json.loads(done.stdout.splitlines()[-1]))
            for cached in (tmp_path / "home").rglob("pruning_*.json"):
                cached.unlink()
        hub.shutdown()
    assert found == [[plan.hash, 1], [plan.hash, 0]]


# --- plans of others, and damage -------------------------------------------------------------------------------------


def other_plan():
    model = tiny_model("bert")
    site = describe(model).sites[0]
    sites = [replace(s, kept=s.kept[:-1]) if len(s.kept) > 1 else s for s in cut_everywhere(describe(model)).sites]
    assert site.key == sites[0].where
    return PruningPlan("bert", tuple(sites))


def test_another_models_plan_at_that_path_is_not_taken(made, tmp_path):
    _, plan, home = made
    shutil.copytree(home, tmp_path / "small")
    found = opened(tmp_path / "small")
    other_plan().save(tmp_path / "small" / PLAN_FILE)
    with pytest.warns(UserWarning, match=rf"is another plan .* than the one that cut this bert \({plan.hash[:12]}\)"):
        assert history_of(found).plan.hash == plan.hash


def test_a_report_of_another_plan_is_not_taken(made, tmp_path):
    _, plan, home = made
    shutil.copytree(home, tmp_path / "small")
    report = json.loads((home / REPORT_FILE).read_text())
    (tmp_path / "small" / REPORT_FILE).write_text(json.dumps({**report, "plan": "0" * 64}))
    with pytest.warns(UserWarning, match="belongs to another plan"):
        found = history_of(opened(tmp_path / "small"))
    assert (found.plan.hash, found.cuts) == (plan.hash, ())


def test_a_plan_that_is_nowhere_is_said(made, tmp_path):
    """An early hf_prune kept it beside the weights alone."""
    _, plan, home = made
    found = opened(home)
    found.config.hf_prune = {key: value for key, value in found.config.hf_prune.items() if key != "kept"}
    found.save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match=rf"plan {plan.hash[:12]}, which is neither in its config nor beside"):
        assert history_of(opened(tmp_path / "plain")) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"plan": "0" * 64}, "one of them was edited"),
        ({"kept": "all"}, "is no plan"),
        ({"kept": {}}, "one of them was edited"),
        ({"kept": {"encoder.0.ffn": "neurons 1000000000 AAAA"}}, "not of 1000000000"),
        ({"kept": {"encoder.0.ffn": "neurons -8 AQ=="}}, "is no plan"),
        ({"kept": {"encoder.0.ffn": "neurons 8 AA=="}}, "must keep at least one"),
        ({"kept": {"encoder.0.ffn": "neurons 8"}}, "is no plan"),
        ({"kept": {"encoder.0.ffn": " 8 AQ=="}}, "an axis is a word"),
        ({"kept": {"encoder.0.ffn": "fish 8 AQ=="}}, "one of them was edited"),
        ({"kept": {"encoder.x.ffn": "neurons 8 AQ=="}}, "is no plan"),
        ({"kept": {"encoder.0": "neurons 8 AQ=="}}, "is no place"),
        ({"kept": {"encoder.0.ffn": "neurons 8 A*=="}}, "is no plan"),
        ({"kept": {"encoder.0.ffn": None}}, "is no plan"),
        ({"kept": [1]}, "is no plan"),
        ({"format": 3}, "in format 3"),
    ],
)
def test_a_damaged_plan_in_the_config_is_refused_before_anything_is_changed(made, tmp_path, change, match):
    _, _, home = made
    found = opened(home)
    found.save_pretrained(tmp_path / "plain")
    found = opened(tmp_path / "plain")  # no plan beside it
    found.config.hf_prune = {**found.config.hf_prune, **change}
    weights = {name: value.clone() for name, value in found.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        cut_again(found)
    with pytest.raises(ValueError, match=match):
        save_pretrained(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in weights.items())
    found.config.hf_prune = {k: v for k, v in found.config.hf_prune.items() if k not in ("plan", "kept")} | {
        "format": 1
    }
    assert history_of(found) is None  # the way out that the message names


def test_a_damaged_plan_in_the_config_is_no_loss_beside_the_file(made):
    _, plan, home = made
    found = opened(home)
    found.config.hf_prune = {**found.config.hf_prune, "kept": "damaged"}
    assert history_of(found).plan.hash == plan.hash


# --- in a config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_packed_plan_is_the_plan(family):
    plan = cut_everywhere(describe(tiny_model(family)))
    assert unpack(plan.model_type, json.loads(json.dumps(pack(plan)))) == plan


def test_a_packed_plan_is_small():
    """Of 32 layers of 11,008 neurons and 32 heads, less than 64 KB: fine in a config.json."""
    sites = [Kept(("decoder", i, "ffn"), "neurons", 11008, tuple(range(0, 11008, 2))) for i in range(32)]
    sites += [Kept(("decoder", i, "attention"), "heads", 32, tuple(range(0, 32, 2))) for i in range(32)]
    assert len(json.dumps(pack(PruningPlan("llama", tuple(sites))))) < 64 * 1024


def test_the_config_still_is_a_config(made, tmp_path):
    """What transformers, peft and generate do with a config, they do with one that carries a plan."""
    model, plan, home = made
    config = transformers.AutoConfig.from_pretrained(home)
    config.save_pretrained(tmp_path / "again")
    for found in (
        copy.deepcopy(config), type(config).from_dict(config.to_dict()), transformers.AutoConfig.from_pretrained(home),
        type(config).from_dict(json.loads(config.to_json_string())), pickle.loads(pickle.dumps(config)),
        type(config).from_dict(config.to_diff_dict()), transformers.AutoConfig.from_pretrained(tmp_path / "again"),
    ):  # fmt: skip
        assert found.hf_prune["plan"] == plan.hash
        assert unpack("bert", found.hf_prune["kept"]).hash == plan.hash
        assert found.hf_prune["kept"] == model.config.hf_prune["kept"]
    transformers.GenerationConfig.from_model_config(config)
    assert "kept" in repr(config)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's and transformers', of each other
def test_generate_and_adapters_take_a_config_with_a_plan():
    import peft

    model = cut_tiny("LlamaForCausalLM", "per_layer")
    batch = rows(tiny_batch(model, padded=False), slice(0, 2))
    made = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    assert made.shape[1] > batch["input_ids"].shape[1]
    plan = model._hf_prune.plan.hash
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM"))
    assert history_of(adapted.merge_and_unload()).plan.hash == plan


def test_nothing_is_said_where_nothing_is_wrong(made, tmp_path, monkeypatch):
    _, _, home = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for route in (moved, relative, stock_save):
            work = tmp_path / route.__name__
            work.mkdir()
            assert history_of(route(home, work, monkeypatch)) is not None
