"""Layers as units: cut, masked and reloaded alike in every class; which go, what is refitted, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import CONFIGS, FIXED_CLASSES, tiny_batch, tiny_model
from transformers import AutoConfig

from hf_prune import PruningConfig, analyze, describe, prune, save_pretrained
from hf_prune.execute import Repair, execute_
from hf_prune.model.anatomy import Extent
from hf_prune.model.axes import Axis
from hf_prune.model.depth import drop_layers_, without_layers
from hf_prune.model.mask import masked
from hf_prune.plan import Kept, PruningPlan
from hf_prune.score.depth import angle, angular, block_influence, distances, order_of, turned

DEEP = {"num_hidden_layers": 4, "n_layers": 4, "n_layer": 4, "num_layers": 4, "encoder_layers": 4, "decoder_layers": 3}


def deep_model(family, name=None, **changes):
    depth = {key: value for key, value in DEEP.items() if key in CONFIGS[family]}
    return tiny_model(family, name, **depth, **({"num_decoder_layers": 3} if family == "t5" else {}), **changes)


def inputs_of(model, batch):
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
    if model.config.is_encoder_decoder and "input_ids" in inputs:
        inputs.setdefault("decoder_input_ids", inputs["input_ids"])
    return inputs


def without(anatomy, gone):
    """A plan that drops these layers of every stack, and leaves the rest whole."""
    kept = []
    for extent in anatomy.extents:
        if extent.path:
            left = [i for i in range(extent.of) if i not in gone]
            kept.append(Kept(extent.where, "layers", extent.of, tuple(left)))
    sites = [
        Kept(site.key, site.inner.name, n := site.sizes[site.inner.name], range(n))
        for site in anatomy.sites
        if site.layer not in gone
    ]
    return PruningPlan(anatomy.model_type, (*kept, *sites))


@pytest.mark.parametrize(("family", "name"), FIXED_CLASSES)
def test_dropped_layers_are_as_masked_ones(family, name, tmp_path):
    model = deep_model(family, name)
    dense, batch = copy.deepcopy(model), tiny_batch(model)
    plan = without(describe(model), (1, 2) if family != "opt" else (1,))
    result = prune(model, [batch], PruningConfig(keep=1.0, repair="none"), plan=plan)
    inputs = inputs_of(model, batch)
    with torch.no_grad():
        with masked(dense, describe(dense), plan):
            wanted = dense(**inputs)[0]
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-5, atol=1e-5)
    assert result.report["after"]["params_model"] == sum(p.numel() for p in model.parameters())
    assert save_pretrained(model, tmp_path / "small", [inputs]) == 0
    assert model.config.hf_prune["shapes"] == "stock"
    reloaded = type(model).from_pretrained(tmp_path / "small")
    assert describe(reloaded).sizes == describe(model).sizes


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"])
def test_a_cache_counts_the_layers_that_are_left(name):
    family = {"LlamaForCausalLM": "llama", "Gemma3ForCausalLM": "gemma3_text", "GPT2LMHeadModel": "gpt2"}.get(
        name, "opt"
    )
    model = deep_model(family, name)
    prune(model, [tiny_batch(model)], PruningConfig(keep=1.0, repair="none"), plan=without(describe(model), (0, 2)))
    ids = torch.randint(5, 99, (2, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with_cache = model.generate(ids, **options)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **options))
    assert torch.equal(with_cache, model.generate(ids, cache_implementation="static", **options))


def test_lists_along_the_layers_follow(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = deep_model("gemma2", layer_types=kinds)
    prune(model, [tiny_batch(model)], PruningConfig(keep=1.0, repair="none"), plan=without(describe(model), (0, 2)))
    assert model.config.layer_types == ["full_attention", "full_attention"]
    save_pretrained(model, tmp_path / "small")
    assert AutoConfig.from_pretrained(tmp_path / "small").layer_types == ["full_attention", "full_attention"]


def test_each_side_of_an_encoder_decoder_by_itself():
    model = deep_model("t5")
    anatomy = describe(model)
    plan = without(anatomy, (1,))
    kept = [k for k in plan.kept if k.where != ("decoder",) and k.where[0] != "decoder"]
    whole = [
        Kept(site.key, site.inner.name, n := site.sizes[site.inner.name], range(n))
        for site in anatomy.sites
        if site.stack == "decoder"
    ]
    prune(model, [tiny_batch(model)], PruningConfig(keep=1.0, repair="none"), plan=PruningPlan("t5", (*kept, *whole)))
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 3)
    assert (len(model.encoder.block), len(model.decoder.block)) == (3, 3)
    assert (model.encoder.config.num_hidden_layers, model.decoder.config.num_hidden_layers) == (3, 3)


def test_plans_with_layers_compose(tmp_path):
    model = deep_model("bert")
    batch = tiny_batch(model, batch=16)
    first = prune(model, [batch], PruningConfig(keep=1.0, repair="none"), plan=without(describe(model), (1,))).plan
    prune(model, [batch], PruningConfig(keep=0.8, units=["neurons"], align=8, sequence_length=12, repair="none"))
    save_pretrained(model, tmp_path / "twice")
    reloaded = type(model).from_pretrained(tmp_path / "twice")
    second = prune(
        reloaded, [batch], PruningConfig(keep=1.0, repair="none"), plan=without(describe(reloaded), (0,))
    ).plan
    composed = reloaded._hf_prune.plan
    assert composed[("encoder",)] == Kept(("encoder",), "layers", 4, (2, 3))
    assert [kept.where for kept in composed.sites] == [
        ("encoder", layer, kind) for layer in (2, 3) for kind in ("attention", "ffn")
    ]
    assert len(composed[("encoder", 2, "ffn")].kept) < 48
    assert first[("encoder",)].kept == (0, 2, 3)
    assert second[("encoder",)].kept == (1, 2)


def test_a_stopped_cut_puts_the_layers_back(monkeypatch):
    from hf_prune import oneshot

    model = deep_model("llama")
    batch, before = tiny_batch(model), {k: v.clone() for k, v in model.state_dict().items()}

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(oneshot, "write_", stop)
    with pytest.raises(KeyboardInterrupt):
        prune(model, [batch], PruningConfig(keep=1.0, repair="none"), plan=without(describe(model), (1, 2)))
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- which go --------------------------------------------------------------------------------------------------------


def test_criteria_by_hand():
    distance = torch.tensor(
        [
            [0.0, 0.5, 0.6, 0.7, 0.9],
            [0.5, 0.0, 0.3, 0.2, 0.8],
            [0.6, 0.3, 0.0, 0.1, 0.7],
            [0.7, 0.2, 0.1, 0.0, 0.6],
            [0.9, 0.8, 0.7, 0.6, 0.0],
        ]
    )
    assert angular(distance, ())(1) == (2,)
    assert angular(distance, ())(2) == (1, 2)  # the turns of 1 and 2 cancel in part
    assert angular(distance, ())(3) == (0, 1, 2)  # 0.7, where 1, 2, 3 turn by 0.8: an end has to go
    assert angular(distance, (0,))(3) == (1, 2, 3)
    assert block_influence(distance, ())(2) == (1, 2)
    assert block_influence(distance, (2,))(2) == (0, 1)


def test_distances_are_angles_between_the_states_in_front_of_layers():
    model = deep_model("llama")
    from hf_prune.model.batches import draw

    batches = draw(model, [tiny_batch(model)], 8, 0)
    with torch.no_grad():
        inputs = {**batches[0].inputs}
        states = model(**inputs, output_hidden_states=True).hidden_states
    real = inputs["attention_mask"].bool()
    found = distances(model, describe(model).extent("decoder"), batches, angle)
    cosine = torch.nn.functional.cosine_similarity(states[1][real], states[3][real], dim=-1)
    assert float(found[1, 3]) == pytest.approx(float((torch.arccos(cosine) / torch.pi).mean()), rel=1e-4)
    turns = distances(model, describe(model).extent("decoder"), batches, turned)
    assert float(turns[1, 3]) == pytest.approx(float((1 - cosine).mean()), rel=1e-3)


@pytest.mark.parametrize("criterion", ["angular", "block_influence", "sleb", "random"])
def test_every_criterion_names_as_many_layers_as_asked(criterion):
    model = deep_model("t5")
    from hf_prune.model.batches import draw

    batches = draw(model, [tiny_batch(model)], 8, 0)
    extent = describe(model).extent("decoder")
    order = order_of(criterion, model, extent, batches, 0, 2)
    for count in (1, 2):
        gone = order(count)
        assert len({*gone}) == count
        assert 0 not in gone


def test_sleb_takes_the_layer_that_is_missed_least():
    model = deep_model("llama")
    from hf_prune.model.batches import draw
    from hf_prune.score.depth import mean_loss

    batches = draw(model, [tiny_batch(model)], 8, 0)
    extent = describe(model).extent("decoder")
    losses = []
    for gone in range(4):
        with without_layers(model, extent, [i for i in range(4) if i != gone]):
            losses.append(mean_loss(model, batches))
    (first,) = order_of("sleb", model, extent, batches, 0, 1)(1)
    assert losses[first] == min(losses)


# --- repair and the budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3_text", "t5", "gpt2", "bart", "vit"])
def test_what_stands_before_a_gap_is_refitted_towards_what_was_behind_it(family):
    """A layer that is nearly linear can be taken over: the outputs get closer to the dense ones."""
    model = deep_model(family)
    dense, batches = copy.deepcopy(model), [tiny_batch(model, batch=32, length=16, seed=seed) for seed in range(4)]
    plan, anatomy = without(describe(model), (2,)), describe(model)
    config = PruningConfig(keep=1.0, repair="least_squares", criterion="magnitude")
    plain = copy.deepcopy(model)
    execute_(plain, anatomy, plan, Repair())
    report = prune(model, batches, config, plan=plan).report
    gaps = [repair for repair in report["repairs"] if repair["gap"]]
    assert gaps
    assert all(repair["error_after"] <= repair["error_before"] for repair in gaps)
    assert any(repair["accepted"] or repair.get("norm_refitted") for repair in gaps)
    inputs = inputs_of(model, tiny_batch(model, batch=32, length=16, seed=9))
    with torch.no_grad():
        wanted = dense(**inputs)[0]
        apart = [(each(**inputs)[0] - wanted).square().mean() for each in (plain, model)]
    assert apart[1] < apart[0]


def test_a_budget_is_divided_by_what_is_measured():
    model = deep_model("llama")
    batches = [tiny_batch(model, seed=seed) for seed in range(4)]
    config = PruningConfig(
        keep=0.7, metric="params", units=["neurons", "layers"], align=1, sequence_length=12, repair="none"
    )
    analysis = analyze(model, batches, config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan, tried = analysis.decide(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(model.model.layers) == 4
    losses = {row["kept"]["decoder layers"][0]: row["held_out_loss"] for row in tried}
    assert len(losses) >= 3
    assert max(losses) == 4
    chosen = len(plan[("decoder",)].kept)
    assert losses[chosen] == min(losses.values())
    result = analysis.cut_(model)
    assert result.report["keep"] <= 0.7
    assert [row["kept"] for row in result.report["divisions"]] == [row["kept"] for row in tried]


def test_layers_alone_leave_the_rest_whole():
    model = deep_model("bert")
    batch = tiny_batch(model, batch=16)
    result = prune(model, [batch], PruningConfig(keep=0.51, units=["layers"], sequence_length=12, repair="none"))
    assert model.config.num_hidden_layers == 2
    assert all(kept.is_identity for kept in result.plan.sites)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_list_of_another_length_is_refused():
    model = deep_model("gemma2")
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(ValueError, match=r"layer_types has 3 entries, the model 4 layers"):
        prune(model, [tiny_batch(model)], PruningConfig(keep=0.6, units=["layers"]))
    assert len(model.model.layers) == 4


def test_layers_that_are_told_apart_by_number_are_refused():
    model = deep_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="reads layers by their numbers"):
        prune(model, [tiny_batch(model)], PruningConfig(keep=0.6, units=["layers"]))
    with pytest.raises(ValueError, match="reads layers by their numbers"):
        prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=without(describe(model), (1,)))
    assert len(model.transformer.h) == 4


def test_the_layer_that_makes_the_position_bias_stays():
    model = deep_model("t5")
    with pytest.raises(ValueError, match=r"drops layers \[0\] .* cannot go"):
        prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=without(describe(model), (0,)))


def test_a_budget_that_one_layer_exceeds_is_refused():
    model = deep_model("bert")
    with pytest.raises(ValueError, match="cannot be reached"):
        prune(model, [tiny_batch(model)], PruningConfig(keep=0.05, units=["layers"], sequence_length=12))
    assert len(model.bert.encoder.layer) == 4


def test_a_plan_that_keeps_units_of_a_dropped_layer_is_none():
    with pytest.raises(ValueError, match="drops that layer"):
        PruningPlan("bert", (Kept(("encoder",), "layers", 2, (0,)), Kept(("encoder", 1, "ffn"), "neurons", 4, (0,))))


def test_numbers_follow_in_modules_and_configs():
    model = deep_model("bart")
    drop_layers_(model, Extent(("decoder",), Axis("layers", "decoder_layers"), 3, "model.decoder.layers"), (0, 2))
    assert model.config.decoder_layers == 2
    assert model.config.encoder_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.decoder.layers] == [0, 1]
