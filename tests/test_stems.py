"""Channels between the convolutions in front of the layers of speech models: cuts, checkpoints, costs, repair."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import (
    SOUND,
    changed,
    cut_everywhere,
    distance,
    keep,
    outputs,
    snapshot,
    tiny_batch,
    tiny_model,
    within_reach,
)
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hf_prune import PruningCallback, PruningConfig, describe, prune, save_pretrained
from hf_prune.checkpoint.layout import needs_loader
from hf_prune.decide.costs import macs, params, planned_sizes
from hf_prune.decide.knapsack import Table, chains, chosen_of
from hf_prune.model import axes
from hf_prune.model.batches import prepare, token_mask
from hf_prune.model.cut import cut_
from hf_prune.model.mask import masked
from hf_prune.model.sites import consumer
from hf_prune.oneshot import analyze
from hf_prune.plan import STEM, PruningPlan
from hf_prune.report.anatomy import anatomy_rows, stock_note
from hf_prune.score.statistics import gate_hook, gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning"),
    pytest.mark.filterwarnings("ignore:No labels:UserWarning"),
]
FOUR = {
    "conv_dim": [8, 12, 12, 10], "conv_kernel": [6, 3, 3, 2], "conv_stride": [3, 2, 2, 1], "num_feat_extract_layers": 4,
}  # fmt: skip
MODELS = {"wav2vec2": FOUR, "hubert": FOUR, "unispeech-sat": FOUR, "wavlm": FOUR, "whisper": {}}
every_model = pytest.mark.parametrize("name", MODELS)
PLAIN = PruningConfig(repair="none")
NAMED = PruningConfig(units=["channels"], shapes="per_layer", align=1, criterion="hessian")


def small(name, **changes):
    return tiny_model(name, **{**MODELS[name], **changes})


def batch_of(model, batch=8, seed=0):
    given = tiny_batch(model, batch, seed=seed)
    if model.main_input_name == "input_values":
        given["input_values"] = torch.randn(batch, 160, generator=torch.Generator().manual_seed(seed))
    return given


def stem_of(model):
    return [site for site in describe(model).sites if site.is_stem]


def fewer(anatomy):
    """A plan that removes channels alone, of the sites with even numbers more than of the odd ones."""
    stem = [site for site in anatomy.sites if site.is_stem]
    cut = {s.key: keep(s, [i for i in range(s.sizes["channels"]) if i % (2 + n % 2)]) for n, s in enumerate(stem)}
    return PruningPlan(anatomy.model_type, tuple(cut.get(site.key, keep(site)) for site in anatomy.sites))


# --- cuts ------------------------------------------------------------------------------------------------------------


@every_model
def test_masked_is_cut(name):
    model = small(name).double()
    batch, anatomy = batch_of(model), describe(model)
    plan, dense = fewer(anatomy), outputs(model, batch)
    with masked(model, anatomy, plan):
        wanted = outputs(model, batch)
    prune(model, [batch], PLAIN, plan=plan)
    assert distance(outputs(model, batch), wanted) <= 1e-6
    assert distance(wanted, dense) > 1e-2
    counts = {site.key: len(plan[site.key].kept) for site in stem_of(model)}
    assert counts == {site.key: site.sizes["channels"] for site in stem_of(model)}


@every_model
def test_all_kept_is_nothing_changed(name):
    model = small(name)
    before = snapshot(model)
    prune(model, [batch_of(model)], PLAIN, plan=PruningPlan(name, tuple(map(keep, describe(model).sites))))
    assert list(changed(before, model)) == []


def test_attributes_say_the_sizes():
    model = small("wav2vec2")
    prune(model, [batch_of(model)], PLAIN, plan=fewer(describe(model)))
    layers = model.wav2vec2.feature_extractor.conv_layers
    assert model.config.conv_dim == [4, 8, 6, 10]
    for before, layer in zip([1, 4, 8, 6], layers, strict=True):
        assert (layer.conv.in_channels, layer.in_conv_dim) == (before, before)
        assert layer.conv.out_channels == layer.out_conv_dim == len(layer.conv.weight)
    norm = layers[0].layer_norm
    assert norm.num_groups == norm.num_channels == len(norm.weight) == len(norm.bias) == 4


def test_gate_gradients_are_finite_differences():
    model = small("whisper").double()
    site, *_ = stem_of(model)
    batch = prepare(model, batch_of(model, 2), torch.zeros(2))
    batch.inputs["input_features"] = batch.inputs["input_features"].double()
    labels = batch.targets["labels"]
    found = gradients(model, [site], {site.key: 32}, batch).gates[site.key].sum(0)

    def loss(gate):
        handle = consumer(model, site).register_forward_pre_hook(gate_hook(gate))
        logits = model(**batch.inputs, labels=labels).logits
        handle.remove()
        each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return each.mean(1).sum().item()

    for unit in (0, 9, 30):
        step = torch.zeros(1, 32)
        step[0, unit] = 0.02
        assert found[unit].item() == pytest.approx((loss(1 + step) - loss(1 - step)) / 0.04, rel=0.05, abs=2e-3)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("all_units", [False, True])
def test_saved_and_opened(name, all_units, tmp_path):
    """In a stock checkpoint where the config has a key; beside other numbers in every layer also in another form."""
    model = small(name)
    batch, anatomy = batch_of(model), describe(model)
    prune(model, [batch], PLAIN, plan=cut_everywhere(anatomy) if all_units else fewer(anatomy))
    got = outputs(model, batch)
    form = "per_layer" if all_units else "uniform" if name == "whisper" else "stock"
    assert model.config.hf_prune["shapes"] == form
    assert needs_loader(model.config) == (form != "stock")
    save_pretrained(model, tmp_path / "m", [batch], remote_code=form != "stock")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, batch), got) <= 1e-5
    assert describe(again).sizes == describe(model).sizes
    model.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain").eval()
    assert distance(outputs(plain, batch), got) <= 1e-5


def test_a_checkpoint_is_cut_again(tmp_path):
    model = small("wav2vec2")
    batch = batch_of(model)
    prune(model, [batch], PLAIN, plan=cut_everywhere(describe(model)))
    save_pretrained(model, tmp_path / "m", [batch])
    again = type(model).from_pretrained(tmp_path / "m").eval()
    prune(again, [batch], PLAIN, plan=fewer(describe(again)))
    assert again._hf_prune.plan[STEM, 0, "convolution"].of == 8
    again.save_pretrained(tmp_path / "n")
    last = type(model).from_pretrained(tmp_path / "n").eval()
    assert distance(outputs(last, batch), outputs(again, batch)) <= 1e-5


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_checkpoints_that_know_no_stem_open(name, tmp_path):
    """As hf_prune wrote them before there were stems: cut, composed with, and cut again."""
    model = small(name)
    batch, anatomy = batch_of(model), describe(model)
    others = PruningPlan(name, tuple(k for k in cut_everywhere(anatomy).kept if k.where[0] != STEM))
    prune(model, [batch], PLAIN, plan=others)
    entry = model.config.hf_prune
    entry["dense"] = {key: n for key, n in entry["dense"].items() if "conv_dim" not in key and "stem" not in key}
    if "layers" in entry:
        entry["layers"] = {site: sizes for site, sizes in entry["layers"].items() if not site.startswith(STEM)}
    model.save_pretrained(tmp_path / "m")
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, batch), outputs(model, batch)) <= 1e-5
    prune(again, [batch], PLAIN, plan=fewer(describe(again)))
    assert {site.key for site in stem_of(again)} <= {kept.where for kept in again._hf_prune.plan.kept}
    again.save_pretrained(tmp_path / "n")
    last = type(model).from_pretrained(tmp_path / "n").eval()
    assert distance(outputs(last, batch), outputs(again, batch)) <= 1e-5


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_names_all_of_a_stem_or_nothing():
    assert STEM == axes.STEM
    anatomy = describe(small("wav2vec2"))
    silent = PruningPlan("wav2vec2", tuple(keep(site) for site in anatomy.sites if not site.is_stem))
    silent.check("wav2vec2", anatomy.words)
    assert planned_sizes(anatomy, silent) == anatomy.sizes
    for gone in (0, -1):
        kept = list(map(keep, anatomy.sites))
        kept.pop(gone)
        with pytest.raises(ValueError, match="not in the plan"):
            PruningPlan("wav2vec2", tuple(kept)).check("wav2vec2", anatomy.words)


@every_model
def test_a_stem_goes_only_where_it_is_named(name):
    """Without, the costs and the plan are those of the model whose stem is no part of the blocks."""
    model = small(name)
    anatomy = describe(model)
    bare = anatomy.without_stem()
    for cost in (macs, params):
        for scope in ("model", "blocks"):
            whole = cost(anatomy, 40, scope).total(anatomy.sizes)
            assert cost(bare, 40, scope).total(bare.sizes) == pytest.approx(whole)
    config = within_reach(model, PruningConfig(shapes="per_layer", criterion="hessian", repair="none"))
    plan = analyze(model, [batch_of(model)], config).plan()
    assert {site.where[0] for site in plan.sites} <= {"encoder", "decoder"}
    prune(model, [batch_of(model)], config)
    assert all(len(module.weight) == module.out_channels for module in model.modules() if isinstance(module, nn.Conv1d))
    assert [site.sizes for site in stem_of(model)] == [site.sizes for site in stem_of(small(name))]


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
def test_a_budget_is_met(shapes):
    """Also where what remains of neighbours is a product: next to nothing is given away."""
    model = small("wav2vec2", conv_dim=[64, 64, 64, 64], attn_implementation="eager")
    dense = counted(model, 128)
    config = replace(NAMED, keep=0.5, shapes=shapes, repair="none")
    result = prune(model, [batch_of(model)], config)
    assert 0.49 * dense <= counted(model, 128) <= 0.505 * dense  # positions at the ends are not counted
    assert 0.49 <= result.plan.cost["keep"] <= 0.5


def test_a_chain_is_the_best_of_all_choices():
    """Three groups, neighbours with a matrix between them, which the first counts with all units of the second."""
    draw, units = np.random.default_rng(0), np.arange(1, 7)
    tables = [Table(np.sort(draw.random(6))[::-1] * units[::-1], cost * units) for cost in (60.0, 36.0, 5.0)]
    twice = {0: 10.0 * np.outer(units, 6 - units), 1: 6.0 * np.outer(units, 6 - units)}

    def cost(i, j, k):
        return 10 * units[i] * units[j] + 6 * units[j] * units[k] + 5 * units[k]

    def loss(chosen):
        return sum(table.loss[option] for table, option in zip(tables, chosen, strict=True))

    joined = chains(tables, twice)
    assert len(joined) == 1
    assert chosen_of(joined, 20) is None
    assert chosen_of(joined, 21) == [0, 0, 0]
    for budget in (60, 150, 300, 606):
        chosen = chosen_of(joined, budget)
        assert cost(*chosen) <= budget
        every = (i for i in np.ndindex(6, 6, 6) if cost(*i) <= budget)
        assert loss(chosen) == pytest.approx(min(map(loss, every)))


# --- costs -----------------------------------------------------------------------------------------------------------


def counted(model, tokens=40):
    """Multiply-adds by torch for so many tokens of each stack."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if model.main_input_name == "input_features":
            features = torch.zeros(1, model.config.num_mel_bins, 2 * tokens)
            model(input_features=features, decoder_input_ids=torch.ones(1, tokens, dtype=torch.long))
        else:
            config, length = model.config, tokens
            for kernel, stride in zip(config.conv_kernel[::-1], config.conv_stride[::-1], strict=True):
                length = (length - 1) * stride + kernel
            model(input_values=torch.zeros(1, length))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "whisper"])
def test_multiply_adds_are_those_that_torch_counts(name):
    longer = {"max_source_positions": 600, "max_target_positions": 600} if name == "whisper" else {}
    model = small(name, attn_implementation="eager", **longer)
    anatomy = describe(model)
    predicted, plan = macs(anatomy, 600), cut_everywhere(anatomy)
    assert predicted.total(anatomy.sizes) == pytest.approx(counted(model, 600), rel=0.01)
    for site in anatomy.sites:
        cut_(model.get_submodule(site.path), site, plan[site.key].axis, plan[site.key].kept)
    left = describe(model)
    assert macs(left, 600).total(left.sizes) == pytest.approx(counted(model, 600), rel=0.01)
    assert predicted.total(left.sizes) == pytest.approx(counted(model, 600), rel=0.01)


@every_model
def test_parameters_are_those_that_are_there(name):
    model = small(name)
    anatomy = describe(model)
    costs = params(anatomy, scope="model")
    assert costs.total(anatomy.sizes) == sum(p.numel() for p in model.parameters())
    blocks = params(anatomy).total(anatomy.sizes)
    prune(model, [batch_of(model)], PLAIN, plan=fewer(anatomy))
    left = describe(model)
    assert costs.total(left.sizes) == sum(p.numel() for p in model.parameters())
    assert params(left).total(left.sizes) == blocks == left.block_params


def test_what_is_printed():
    anatomy = describe(small("wav2vec2"))
    rows = anatomy_rows(anatomy, 40)
    assert [row["site"] for row in rows[:3]] == [f"stem {n}convolution" for n in ("", "second_", "third_")]
    assert "kept under" not in stock_note(anatomy)
    assert "(--units channels)" in stock_note(anatomy)
    assert "(--units channels --shapes per_layer)" in stock_note(describe(small("whisper")))


# --- repair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_repair_lowers_the_error(name):
    """Of every convolution that reads fewer channels, on rows that are held out; and of the whole model."""
    model, plain = small(name), small(name)
    data = [batch_of(model, 64, seed) for seed in range(3)]
    fresh = batch_of(model, 64, 7)
    for batch in (*data, fresh):
        batch.pop("labels", None)
        if name == "whisper":
            batch["decoder_input_ids"] = torch.ones(64, 2, dtype=torch.long)
    dense, plan = outputs(model, fresh), fewer(describe(model))
    result = prune(model, data, NAMED, plan=plan)
    prune(plain, data, PLAIN, plan=plan)
    stem = [repair for repair in result.report["repairs"] if repair["site"].startswith(STEM)]
    assert len(stem) == len(stem_of(model))
    assert all(repair["accepted"] and repair["error_after"] < repair["error_before"] for repair in stem)
    repaired, cut = ((outputs(m, fresh)[0] - dense[0]).square().mean() for m in (model, plain))
    assert repaired < 0.8 * cut


def test_padded_sound_has_no_mask_in_a_stem():
    model = small("wav2vec2")
    given = {**batch_of(model), "attention_mask": torch.ones(8, 160, dtype=torch.long)}
    assert token_mask(model, prepare(model, given, torch.zeros(8)), STEM) is None
    prune(model, [given], replace(NAMED, keep=0.97))


@pytest.mark.parametrize("criterion", ["fisher", "fisher_joint", "hessian", "magnitude", "activation", "taylor"])
def test_channels_beside_other_units(criterion):
    model = small("whisper")
    config = PruningConfig(
        units=["channels", "neurons"], shapes="per_layer", criterion=criterion, align=1, metric="params", scope="model",
        keep=0.9,
    )  # fmt: skip
    result = prune(model, [batch_of(model, 16)], config)
    assert result.report["keep"] <= 0.9
    assert sum(p.numel() for p in model.parameters()) <= 0.9 * sum(p.numel() for p in small("whisper").parameters())


@pytest.mark.filterwarnings("ignore:.*remains, where keep:UserWarning")
@pytest.mark.parametrize("units", [["channels", "layers"], ["layers"]])
def test_beside_layers(units, tmp_path):
    model = small("whisper", encoder_layers=3, decoder_layers=3)
    batch = batch_of(model, 16)
    prune(model, [batch], replace(NAMED, units=units, keep=0.7, criterion=None))
    assert model.config.encoder_layers < 3
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert distance(outputs(again, batch), outputs(model, batch)) <= 1e-5


def test_a_callback_leaves_the_stem_alone():
    model = small("whisper")
    callback = PruningCallback(PruningConfig(shapes="per_layer", metric="params", keep=0.9))
    callback._start(model)
    assert {where[0] for where in callback._masks} == {"encoder", "decoder"}
    callback._remove()


# --- what cannot go --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav2vec2", "data2vec-audio"])
def test_channels_that_a_layer_norm_reads_stay(name):
    changes = {} if name == "data2vec-audio" else {"feat_extract_norm": "layer"}
    model = tiny_model(name, **SOUND | changes)
    assert stem_of(model) == []
    with pytest.raises(ValueError, match=r"no channels of this .* can go: a LayerNorm over all of them"):
        prune(model, [batch_of(model)], NAMED)
    prune(model, [batch_of(model)], within_reach(model, PruningConfig(criterion="hessian")))
    assert "No channels can go: a LayerNorm" in stock_note(describe(model))


def test_what_is_asked_in_vain_is_refused():
    model = small("whisper")
    with pytest.raises(ValueError, match="a stock whisper config cannot say another number of channels"):
        prune(model, [batch_of(model)], PruningConfig(units=["channels"]))
    with pytest.raises(ValueError, match=r"channels of this whisper lie in front of its blocks.*scope='model'"):
        prune(model, [batch_of(model)], replace(NAMED, metric="params", scope="blocks"))
    with pytest.raises(ValueError, match="this whisper reads input_features"):
        prune(model, [batch_of(model)], replace(NAMED, metric="latency"))
    with pytest.raises(ValueError, match="cannot be reached with"):
        prune(model, [batch_of(model)], replace(NAMED, keep=0.1))
