"""Channels between convolutions: gates, refit, batch norms, groups, checkpoints and costs."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import cut_everywhere, distance, keep, outputs, tiny_batch, tiny_model
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.decide.costs import macs
from hf_prune.decide.latency import clock
from hf_prune.model import patches, prove
from hf_prune.model.batches import prepare
from hf_prune.model.families import registered
from hf_prune.model.feed import feeds
from hf_prune.model.instance import instance
from hf_prune.model.lookup import derivation
from hf_prune.model.sites import consumer
from hf_prune.plan import PruningPlan
from hf_prune.repair.running import estimate_
from hf_prune.report.check import oracle_rows
from hf_prune.score.statistics import gate_hook, gradients

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")
MODELS = {
    "resnet": {}, "resnet-bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [16, 24]}, "regnet": {},
    "regnet-x": {"layer_type": "x"}, "mobilenet_v2": {}, "convnext": {},
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
PLAIN = PruningConfig(repair="none", batch_norm=False)


def small(name):
    return tiny_model(name.partition("-")[0], **MODELS[name])


def moved_norms(model):
    """Running statistics that no fresh model has."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return model


# --- how a consumer reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(6, 5, 3, stride=2, padding=1, bias=False), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, (3, 1), dilation=2),
        nn.Conv1d(6, 5, 4, stride=2, padding=1),
    ],
)  # fmt: skip
def test_rows_times_the_matrix_are_the_outputs(module):
    x = torch.randn(2, 6, 9, 8) if isinstance(module, nn.Conv2d) else torch.randn(2, 6, 9)
    got = functional.linear(patches.read_rows(module, x), module.weight.flatten(1), module.bias)
    assert torch.allclose(got, patches.made_rows(module, module(x)), atol=1e-5)


def test_many_positions_are_sampled_evenly(monkeypatch):
    monkeypatch.setattr(patches, "POSITIONS", 10)
    module, x = nn.Conv2d(3, 2, 1, bias=False), torch.randn(2, 3, 6, 6)
    rows = patches.read_rows(module, x)
    assert rows.shape == (2, 5, 3)
    assert torch.allclose(rows @ module.weight.flatten(1).T, patches.made_rows(module, module(x)), atol=1e-6)
    assert patches.places(36, 5).tolist() == [0, 7, 14, 21, 28]


@every_model
def test_gate_gradients_are_finite_differences(name):
    model = moved_norms(small(name)).double()
    site = describe(model).sites[-1]
    units, batch = site.sizes[site.inner.name], prepare(model, tiny_batch(model, 2), torch.zeros(2))
    found = gradients(model, [site], {site.key: units}, batch).gates[site.key].sum(0)

    def loss(gate):
        handle = consumer(model, site).register_forward_pre_hook(gate_hook(gate))
        logits = model(**batch.inputs).logits
        handle.remove()
        return functional.cross_entropy(logits, batch.targets["labels"], reduction="sum").item()

    for unit in range(0, units, max(units // 3, 1)):
        step = torch.zeros(1, units)
        step[0, unit] = 0.02
        slope = (loss(1 + step) - loss(1 - step)) / 0.04
        assert found[unit].item() == pytest.approx(slope, rel=0.05, abs=2e-3)


# --- cuts ------------------------------------------------------------------------------------------------------------


@every_model
def test_cut_saved_and_opened(name, tmp_path):
    model = moved_norms(small(name))
    batch = tiny_batch(model)
    prune(model, [batch], PLAIN, plan=cut_everywhere(describe(model)))
    got = outputs(model, batch)
    save_pretrained(model, tmp_path / "m", [batch], remote_code=True)
    again = type(model).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, batch), got) <= 1e-5
    assert describe(again).sizes == describe(model).sizes


@every_model
def test_attributes_say_the_sizes(name):
    model = small(name)
    prune(model, [tiny_batch(model)], PLAIN, plan=cut_everywhere(describe(model)))
    for module in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        assert module.out_channels == len(module.weight)
        assert module.in_channels == module.weight.shape[1] * module.groups
        assert module.out_channels % module.groups == 0
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.num_features == len(norm.weight) == len(norm.running_mean) for norm in norms)


def test_groups_go_whole():
    model = small("regnet")
    site = describe(model).sites[0]
    assert (site.sizes["channels"], site.widths["channels"]) == (3, 4)
    prune(model, [tiny_batch(model)], PLAIN, plan=PruningPlan("regnet", (keep(site, [0, 2]), *_others(model, site))))
    grouped = model.get_submodule(site.path).layer[1].convolution
    assert (grouped.groups, grouped.in_channels, grouped.weight.shape[1]) == (2, 8, 4)


def test_the_refit_is_least_squares_on_unfolded_inputs():
    """Against a dense solver: half of the channels, plenty of rows, next to no ridge."""
    model = moved_norms(small("resnet"))
    site = describe(model).sites[1]
    data = [tiny_batch(model, 32, seed=seed) for seed in range(4)]
    layer = model.get_submodule(site.path)
    seen = []
    handle = layer.get_submodule(site.consumer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(pixel_values=batch["pixel_values"])
    handle.remove()
    convolution = layer.get_submodule(site.consumer)
    rows = patches.read_rows(convolution, torch.cat(seen)).flatten(0, 1).double()
    wanted = rows @ convolution.weight.flatten(1).T.double()
    kept = [0, 2, 5, 7]
    columns = rows.unflatten(1, (8, 9))[:, kept].flatten(1)
    best = torch.linalg.lstsq(columns, wanted).solution
    least, plain = ((columns @ w - wanted).square().sum() for w in (best, _cut(convolution, kept)))
    config = PruningConfig(batch_norm=False, criterion="hessian")
    prune(model, data, config, plan=PruningPlan("resnet", (keep(site, kept), *_others(model, site))))
    got = (columns @ layer.get_submodule(site.consumer).weight.flatten(1).T.double() - wanted).square().sum()
    assert got <= 1.02 * least < plain


def _cut(convolution, kept):
    return convolution.weight[:, kept].detach().flatten(1).T.double()


def _others(model, but):
    return [keep(site) for site in describe(model).sites if site.key != but.key]


# --- batch norms -----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_all_examples():
    norm = nn.Sequential(nn.BatchNorm2d(3)).eval()
    parts = [torch.randn(size, 3, 4, 4) * 3 + 1 for size in (5, 2)]
    rows = [torch.tensor([True] * 4 + [False]), torch.tensor([True, True])]
    estimate_(norm, ["0"], [partial(norm, part) for part in parts], rows)
    every = torch.cat([parts[0][:4], parts[1]]).transpose(0, 1).flatten(1)
    assert torch.allclose(norm[0].running_mean, every.mean(1), atol=1e-5)
    assert torch.allclose(norm[0].running_var, every.var(1), atol=1e-4)
    assert not norm[0].training
    assert norm[0].num_batches_tracked == 0


@pytest.mark.parametrize("name", ["resnet", "resnet-bottleneck", "regnet", "mobilenet_v2"])
@pytest.mark.parametrize("repair", ["none", "least_squares"])
def test_norms_behind_a_cut_see_what_they_say(name, repair):
    """Each norm behind what first reads fewer channels has the mean of what it reads in the finished model; the first
    norm of all stays."""
    model = moved_norms(small(name))
    before = {n: m.running_mean.clone() for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    data = [tiny_batch(model, 32, seed=seed) for seed in range(2)]
    config = PruningConfig(repair=repair, criterion="hessian")
    anatomy = describe(model)
    prune(model, data, config, plan=cut_everywhere(anatomy))
    cut = f"{anatomy.sites[0].path}.{anatomy.sites[0].consumer}"
    fitted = [i for i in range(64) if i % 5 != 4]
    pixels = torch.cat([batch["pixel_values"] for batch in data])[fitted]
    seen = {}
    for path in (*before, cut):
        model.get_submodule(path).register_forward_pre_hook(lambda m, args, path=path: seen.update({path: args[0]}))
    with torch.no_grad():
        model(pixel_values=pixels)
    order = [*seen]
    assert torch.equal(model.get_submodule(order[0]).running_mean, before[order[0]])
    behind = order[order.index(cut) + 1 :]
    assert len(behind) > 2
    for path in behind:
        mean = seen[path].transpose(0, 1).flatten(1).mean(1)
        assert torch.allclose(model.get_submodule(path).running_mean, mean, atol=1e-4), path


# --- costs -----------------------------------------------------------------------------------------------------------


def counted(model):
    size = getattr(model.config, "image_size", 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return counter.get_total_flops() / 2


@every_model
def test_multiply_adds_are_those_that_torch_counts(name):
    model = small(name)
    anatomy = describe(model)
    assert macs(anatomy, 128).total(anatomy.sizes) == pytest.approx(counted(model), rel=0.01)
    plan = cut_everywhere(anatomy, uniform=True)
    predicted = macs(anatomy, 128)
    report = prune(model, [tiny_batch(model)], PLAIN, plan=plan)
    left = describe(model)
    assert report.model is model
    assert macs(left, 128).total(left.sizes) == pytest.approx(counted(model), rel=0.01)
    assert predicted.total(left.sizes) == pytest.approx(counted(model), rel=0.01)


def test_a_budget_is_met_where_two_sites_share_a_matrix():
    model = small("resnet-bottleneck")
    dense = counted(model)
    data = [tiny_batch(model, 32)]
    prune(model, data, PruningConfig(keep=0.93, shapes="per_layer", align=1, criterion="magnitude", repair="none"))
    assert 0.88 * dense <= counted(model) <= 0.93 * dense


@every_model
def test_latency_is_measured_where_layers_must_stay(name, monkeypatch):
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(clock, "LEVEL_ROUNDS", 1)
    model = small(name)
    config = PruningConfig(metric="latency", latency_batch_size=2, shapes="per_layer")
    anatomy = describe(model)
    table = clock.measured_table(model, anatomy, config, {s.key: clock.grid_of(s, 4) for s in anatomy.sites})
    assert table.total(anatomy.sizes) > 0
    assert table.units.keys() == {site.key for site in anatomy.sites}


def test_a_model_in_training_is_described_as_it_is():
    """One image of one pixel in the last layers is none that batch norms in training take."""
    model = small("mobilenet_v2").train()
    mean = model.mobilenet_v2.layer[0].conv_3x3.normalization.running_mean.clone()
    assert describe(model).sizes == describe(small("mobilenet_v2")).sizes
    assert model.training
    assert torch.equal(model.mobilenet_v2.layer[0].conv_3x3.normalization.running_mean, mean)


@pytest.mark.parametrize("model_type", ["resnet", "mobilenet_v2", "convnext"])
def test_the_rows_are_proven_on_a_small_instance(model_type):
    """Batch norms whose statistics do not fit would let nothing of the image through."""
    subject = prove.Subject(model := instance(model_type), feeds(model))
    first, second = subject.dense[0]
    assert (first - second).abs().max() > 1e-3
    assert prove.per_layer(subject, registered(model_type).stacks) == ""


def test_a_check_speaks_of_the_stages_that_there_are():
    model = small("resnet-bottleneck")
    said = {row["units"] for row in oracle_rows(model, derivation(model)) if row["row"] == "hand"}
    kinds = ("convolution", "second_convolution")
    assert said == {f"stage{stage} {kind}: channels" for stage in (1, 2) for kind in kinds}


# --- bad input -------------------------------------------------------------------------------------------------------


def test_what_cannot_go_is_refused():
    model = small("resnet")
    data = [tiny_batch(model, 16)]
    for units, message in ((["layers"], "must stay"), (["heads"], "channels"), (["hidden"], "cannot become narrower")):
        with pytest.raises(ValueError, match=message):
            prune(model, data, PruningConfig(units=units, shapes="per_layer" if units != ["hidden"] else "stock"))
    with pytest.raises(ValueError, match="per_layer"):
        prune(model, data, PruningConfig(units=["channels"]))
    with pytest.raises(ValueError, match="batch_norm='yes': must be True or False"):
        PruningConfig(batch_norm="yes")


# --- the example -----------------------------------------------------------------------------------------------------


def test_the_example_runs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    found = importlib.import_module("convolution").main(["--images", "64", "--epochs", "1", "--keep", "0.7"])
    assert found["keep"] <= 0.7
    assert {"dense", "plain cut", "batch norms", "refit", "refit and batch norms", "keep"} == {*found}
