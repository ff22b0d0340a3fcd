"""Checkpoints and plans as hf_prune wrote them before it had axes (format 1): they open, replay and compose."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import cut, distance, outputs, tiny, tiny_batch, within_reach

from hf_prune import PruningConfig, PruningPlan, describe, prune, save_pretrained
from hf_prune.checkpoint.history import PLAN_FILE, REPORT_FILE, history_of
from hf_prune.model.mask import masked
from hf_prune.plan import Kept

AGAIN = PruningConfig(metric="params", shapes="per_layer", repair="none", align=1, criterion="magnitude")
CUTS = [{"before": {"params_blocks": 7808}, "after": {"params_blocks": 4384}, "config": {}}]
DENSE = {  # class -> what makes the tiny model of it
    "LlamaForCausalLM": {"intermediate_size": 8},
    "GPT2LMHeadModel": {"n_inner": 8},
    "T5ForConditionalGeneration": {"d_ff": 8, "num_layers": 1},
}
HASHES = {
    "LlamaForCausalLM": "98ba8da0d70191a46fa50a282c94e364d97ae0f4f1981ed565c91c65bf4180a6",
    "GPT2LMHeadModel": "651c7b0dea2e633c06890983bce96475161b4798c3f1368dccc9c4b15756a085",
    "T5ForConditionalGeneration": "504dce4b62778ef6d12547770204c795a522cbef54c22dd41d8151135f1b59a6",
}
PLANS = {
    "LlamaForCausalLM": """{
 "format": 1,
 "model_type": "llama",
 "config": {},
 "cost": {},
 "sites": [
  {"stack": "decoder", "layer": 0, "kind": "attention", "unit": "head", "of": 4, "kept": [0, 3]},
  {"stack": "decoder", "layer": 0, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [0, 2, 5, 7]},
  {"stack": "decoder", "layer": 1, "kind": "attention", "unit": "kv_group", "of": 2, "kept": [1]},
  {"stack": "decoder", "layer": 1, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [1, 3, 4]}
 ]
}
""",
    "GPT2LMHeadModel": """{
 "format": 1,
 "model_type": "gpt2",
 "config": {},
 "cost": {},
 "sites": [
  {"stack": "decoder", "layer": 0, "kind": "attention", "unit": "kv_group", "of": 4, "kept": [0, 2, 3]},
  {"stack": "decoder", "layer": 0, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [0, 2, 5, 7]},
  {"stack": "decoder", "layer": 1, "kind": "attention", "unit": "kv_group", "of": 4, "kept": [0, 2, 3]},
  {"stack": "decoder", "layer": 1, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [1, 3, 4]}
 ]
}
""",
    "T5ForConditionalGeneration": """{
 "format": 1,
 "model_type": "t5",
 "config": {},
 "cost": {},
 "sites": [
  {"stack": "encoder", "layer": 0, "kind": "attention", "unit": "head", "of": 4, "kept": [1, 2]},
  {"stack": "encoder", "layer": 0, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [0, 2, 5, 7]},
  {"stack": "decoder", "layer": 0, "kind": "attention", "unit": "head", "of": 4, "kept": [1, 2]},
  {"stack": "decoder", "layer": 0, "kind": "cross_attention", "unit": "head", "of": 4, "kept": [1, 2]},
  {"stack": "decoder", "layer": 0, "kind": "ffn", "unit": "neuron", "of": 8, "kept": [1, 3, 4]}
 ]
}
""",
}
ALIKE = {"base_model": "", "criterion": None, "format": 1, "repair": "none", "shapes": "per_layer", "version": "0.1.0"}
IN_THE_CONFIG = {  # beside what the dense config says
    "LlamaForCausalLM": {
        "allow_global_per_layer_attribute_access": True,
        "hf_prune": {
            **ALIKE,
            "after": {"macs_blocks": 1593344.0, "macs_model": 1998848.0, "params_blocks": 4384, "params_model": 10752},
            "before": {"macs_blocks": 3080192.0, "macs_model": 3485696.0, "params_blocks": 7808, "params_model": 14176},
            "dense": {"intermediate_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
            "kept": {
                "decoder.0.attention": "head 4 CQ==",
                "decoder.0.ffn": "neuron 8 pQ==",
                "decoder.1.attention": "kv_group 2 Ag==",
                "decoder.1.ffn": "neuron 8 Gg==",
            },
        },
        "per_layer_config": {
            "0": {"intermediate_size": 4, "num_attention_heads": 2},
            "1": {"intermediate_size": 3, "num_attention_heads": 2, "num_key_value_heads": 1},
        },
    },
    "GPT2LMHeadModel": {
        "allow_global_per_layer_attribute_access": True,
        "head_dim": 8,
        "hf_prune": {
            **ALIKE,
            "after": {"macs_blocks": 2416640.0, "macs_model": 2822144.0, "params_blocks": 7127, "params_model": 12407},
            "before": {"macs_blocks": 3276800.0, "macs_model": 3682304.0, "params_blocks": 9808, "params_model": 15088},
            "dense": {"n_head": 4, "n_inner": 8},
            "kept": {
                "decoder.0.attention": "kv_group 4 DQ==",
                "decoder.0.ffn": "neuron 8 pQ==",
                "decoder.1.attention": "kv_group 4 DQ==",
                "decoder.1.ffn": "neuron 8 Gg==",
            },
        },
        "per_layer_config": {"0": {"n_head": 3, "n_inner": 4}, "1": {"n_head": 3, "n_inner": 3}},
    },
    "T5ForConditionalGeneration": {
        "hf_prune": {
            **ALIKE,
            "after": {"macs_blocks": 2416640.0, "macs_model": 2822144.0, "params_blocks": 6880, "params_model": 10112},
            "before": {
                "macs_blocks": 4849664.0, "macs_model": 5255168.0, "params_blocks": 13728, "params_model": 16960,
            },
            "dense": {"d_ff": 8, "num_heads": 4},
            "kept": {
                "decoder.0.attention": "head 4 Bg==",
                "decoder.0.cross_attention": "head 4 Bg==",
                "decoder.0.ffn": "neuron 8 Gg==",
                "encoder.0.attention": "head 4 Bg==",
                "encoder.0.ffn": "neuron 8 pQ==",
            },
            "layers": {
                "decoder.0.attention": {"num_heads": 2},
                "decoder.0.cross_attention": {"num_heads": 2},
                "decoder.0.ffn": {"d_ff": 3},
                "encoder.0.attention": {"num_heads": 2},
                "encoder.0.ffn": {"d_ff": 4},
            },
        },
    },
}  # fmt: skip


def dense(class_name):
    return tiny(class_name, **DENSE[class_name])


@pytest.fixture(params=list(PLANS))
def name(request):
    return request.param


@pytest.fixture
def home(name, tmp_path):
    """The directory that the earlier version wrote."""
    entry = IN_THE_CONFIG[name]["hf_prune"] | {"plan": HASHES[name]}
    config = {**dense(name).config.to_dict(), **IN_THE_CONFIG[name], "architectures": [name], "hf_prune": entry}
    weights = cut(dense(name), PruningPlan.from_json(PLANS[name])).state_dict()
    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(config))
    (home / PLAN_FILE).write_text(PLANS[name])
    (home / REPORT_FILE).write_text(json.dumps({"format": 1, "plan": HASHES[name], "cuts": CUTS}))
    kept = {key: value for key, value in weights.items() if key not in tied or name == "LlamaForCausalLM"}
    save_file(kept, home / "model.safetensors", {"format": "pt"})
    return home


def opened(name, directory):
    return getattr(transformers, name).from_pretrained(directory).eval()


def test_a_plan_is_read_and_written_in_the_new_words():
    plan = PruningPlan.from_json(PLANS["LlamaForCausalLM"])
    assert plan.kept == (
        Kept(("decoder", 0, "attention"), "heads", 4, (0, 3)),
        Kept(("decoder", 0, "ffn"), "neurons", 8, (0, 2, 5, 7)),
        Kept(("decoder", 1, "attention"), "kv_groups", 2, (1,)),
        Kept(("decoder", 1, "ffn"), "neurons", 8, (1, 3, 4)),
    )
    assert plan.to_dict()["format"] == 2
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_plan_answers_to_both_of_its_names_and_to_no_other(name):
    plan = PruningPlan.from_json(PLANS[name])
    assert plan.hash != HASHES[name]
    assert plan.is_named(HASHES[name])
    assert plan.is_named(plan.hash)
    others = [PruningPlan.from_json(PLANS[other]) for other in PLANS if other != name]
    assert not any(other.is_named(HASHES[name]) for other in others)


def test_a_plan_is_replayed(name, home):
    """Also where a head with its own keys is called a KV group."""
    model = dense(name)
    prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=PruningPlan.load(home / PLAN_FILE))
    assert distance(outputs(model, tiny_batch(model)), outputs(opened(name, home), tiny_batch(model))) <= 1e-5


def test_a_checkpoint_opens_and_knows_its_plan(name, home):
    whole, plan = dense(name), PruningPlan.from_json(PLANS[name])
    with masked(whole, describe(whole), plan):
        expected = outputs(whole, tiny_batch(whole))
    found = opened(name, home)
    assert distance(outputs(found, tiny_batch(whole)), expected) <= 1e-4
    history = history_of(found)
    assert history.plan == plan
    assert history.cuts == tuple(CUTS)


def test_the_config_alone_knows_the_plan(name, home, tmp_path):
    opened(name, home).save_pretrained(tmp_path / "plain")
    found = opened(name, tmp_path / "plain")
    assert found.config.hf_prune["plan"] == HASHES[name]
    by_place = sorted(PruningPlan.from_json(PLANS[name]).kept, key=lambda kept: kept.where)
    assert sorted(history_of(found).plan.kept, key=lambda kept: kept.where) == by_place


def test_a_config_whose_plan_was_edited_is_refused(name, home, tmp_path):
    opened(name, home).save_pretrained(tmp_path / "plain")
    found = opened(name, tmp_path / "plain")
    entry = found.config.hf_prune
    place = next(place for place in entry["kept"] if place.endswith("ffn"))
    found.config.hf_prune = {**entry, "kept": {**entry["kept"], place: "neuron 8 /w=="}}
    with pytest.raises(ValueError, match="one of them was edited"):
        history_of(found)


def test_a_save_without_a_cut_keeps_plan_and_reports(name, home, tmp_path):
    save_pretrained(opened(name, home), tmp_path / "same", [tiny_batch(dense(name))])
    history = history_of(opened(name, tmp_path / "same"))
    assert history.plan == PruningPlan.from_json(PLANS[name])
    assert history.cuts == tuple(CUTS)


@pytest.mark.filterwarnings("ignore:.*remains, where keep=")  # a head is a large part of a tiny model
def test_a_second_cut_composes_and_is_saved_in_the_new_format(name, home, tmp_path):
    found, first = opened(name, home), PruningPlan.from_json(PLANS[name])
    before = found.config.hf_prune
    then = prune(found, [tiny_batch(found)], within_reach(found, AGAIN)).plan
    assert not then.is_identity
    both = first.compose(then)
    save_pretrained(found, tmp_path / "twice")
    entry = json.loads((tmp_path / "twice/config.json").read_text())["hf_prune"]
    assert (entry["format"], entry["plan"]) == (2, both.hash)
    assert (entry["dense"], entry["before"]) == (before["dense"], before["before"])
    again = opened(name, tmp_path / "twice")
    assert history_of(again).plan.hash == both.hash
    assert len(history_of(again).cuts) == 2
    whole = dense(name)
    cut(whole, both)
    assert distance(outputs(whole, tiny_batch(whole)), outputs(again, tiny_batch(whole))) <= 1e-5
    assert all(torch.equal(whole.state_dict()[key], value) for key, value in again.state_dict().items())
