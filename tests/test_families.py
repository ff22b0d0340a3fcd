"""The cheapest oracles, on every family: masked == cut, saved == reopened, stock where the row says so."""

from __future__ import annotations

import datetime

import pytest
import torch
from tiny import (
    ALL_CLASSES,
    CORE,
    GENERIC,
    changed,
    cut_everywhere,
    distance,
    keep,
    outputs,
    snapshot,
    tiny_batch,
    tiny_model,
    todays,
    within_reach,
)

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.checkpoint.layout import write_
from hf_prune.execute import Repair, _needed_tokens, execute_
from hf_prune.model.batches import draw
from hf_prune.model.mask import masked
from hf_prune.plan import Kept, PruningPlan
from hf_prune.repair.walk import improvement

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")

every_family = pytest.mark.parametrize("family", sorted(ALL_CLASSES))

REFUSED = ("llava",)  # vision_feature_layer


def cut_as_masked(model, plan, directory):
    """Cut the model; its outputs are those of the masked one, and those of the model that is opened again."""
    batch, anatomy = tiny_batch(model), describe(model)
    dense = outputs(model, batch)
    with masked(model, anatomy, plan):
        wanted = outputs(model, batch)
    prune(model, [batch], PruningConfig(repair="none", batch_norm=False), plan=plan)
    got = outputs(model, batch)
    assert distance(got, wanted) <= 1e-4
    assert distance(got, dense) > 1e-3
    model.save_pretrained(directory)
    again = type(model).from_pretrained(directory).eval()
    assert distance(outputs(again, batch), got) <= 1e-5
    assert describe(again).sizes == describe(model).sizes


@every_family
@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_masked_is_cut_is_reopened(family, shapes, tmp_path):
    model = tiny_model(family)
    cut_as_masked(model, cut_everywhere(describe(model), uniform=shapes == "uniform"), tmp_path)


@every_family
def test_all_kept_is_nothing_changed(family):
    model = tiny_model(family)
    outputs(model, tiny_batch(model))  # where hidden states are asked for, transformers hooks itself in for good
    before = snapshot(model)
    plan = PruningPlan(family, tuple(keep(site) for site in describe(model).sites))
    prune(model, [tiny_batch(model)], PruningConfig(repair="none", batch_norm=False), plan=plan)
    assert set(changed(before, model)) <= {"config"}


def half(site):
    """Half of the units, whole groups of heads; all where the stock config cannot say fewer."""
    axis = site.outer
    count = site.sizes[axis.name]
    return keep(site, range(0 if axis.stock == "none" else count // 2, count), axis.name)


@every_family
def test_stock_where_the_row_says_so(family, tmp_path):
    model = tiny_model(family)
    # shared experts are as wide as the others, of which half go whole
    sites = [keep(site) if site.inner.multiple else half(site) for site in describe(model).sites]
    if all(site.is_identity for site in sites):
        pytest.skip("no axis that the stock config can size")
    cut_as_masked(model, PruningPlan(family, tuple(sites)), tmp_path)
    assert model.config.hf_prune["shapes"] == "stock"


@every_family
def test_layers_masked_are_layers_cut(family, tmp_path):
    model = tiny_model(family)
    anatomy = describe(model)
    if model.config.model_type in REFUSED:
        pytest.skip("refused: the config names a layer by its number")
    stacks = [extent for extent in anatomy.extents if extent.path and not extent.is_stem]
    if not all(extent.axis.config for extent in stacks):
        pytest.skip("layers must stay: no key of the config counts them")
    kept = {e.where[0]: [i for i in range(e.of) if i != max(e.axis.fixed, default=-1) + 1] for e in stacks}
    layers = [Kept(e.where, "layers", e.of, tuple(kept[e.where[0]])) for e in stacks]
    sites = [keep(site) for site in anatomy.sites if site.layer in kept.get(site.stack, [0])]
    cut_as_masked(model, PruningPlan(family, (*layers, *sites)), tmp_path)


@every_family
def test_pruned_and_repaired(family):
    """Scored, cut and repaired: held-out rows come closer to what the dense sublayers gave."""
    model = tiny_model(family)
    data = [tiny_batch(model, batch=32, seed=seed) for seed in range(3)]
    taught = "labels" in data[0] and (model.config.is_encoder_decoder or not type(model).__name__.endswith("Model"))
    if not taught:
        data = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    config = PruningConfig(metric="params", shapes="per_layer", criterion=None if taught else "hessian")
    repairs = prune(model, data, within_reach(model, config)).report["repairs"]
    assert improvement(repairs) < 1


@every_family
def test_half_the_tokens_is_half_the_tokens_reopened(family, tmp_path):
    """All copies of the vocabulary are cut, and the stock config says so; the outputs are compared by `execute_`."""
    model = tiny_model(family)
    anatomy, batch = describe(model), tiny_batch(model)
    if () not in {extent.where for extent in anatomy.extents}:
        pytest.skip("reads no tokens")
    whole = anatomy.extent()
    kept = sorted({*range(0, whole.of, 2), *_needed_tokens(model, whole)})
    for name in [name for name in batch if name.endswith("input_ids")]:
        batch[name] = torch.tensor(kept)[batch[name] % len(kept)]
    batches = draw(model, [batch], 8, 0)
    plan = PruningPlan(family, (Kept((), "tokens", whole.of, tuple(kept)), *map(keep, anatomy.sites)))
    with torch.no_grad():
        execute_(model, anatomy, plan, Repair(batches=[] if "pixel_values" in batch else batches))
    assert write_(model, anatomy.family, {}) == "stock"
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert describe(again).sizes == describe(model).sizes
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["gemma3", "vit"])
def test_a_generated_file_opens_renamed_weights(family, tmp_path):
    """transformers renames the weights of some classes when it opens them, of custom code only where it is told to."""
    model = tiny_model(family)
    batch, plan = tiny_batch(model), cut_everywhere(describe(model))
    prune(model, [batch], PruningConfig(repair="none", batch_norm=False), plan=plan)
    save_pretrained(model, tmp_path / "m", [batch], remote_code=True)  # proves that it opens as it was


# --- the sample of the day -------------------------------------------------------------------------------------------


def test_the_sample_comes_round():
    """The core every day; all others within a number of days."""
    day = datetime.date(2026, 1, 1)
    assert todays(day) == todays(day)
    days = [todays(day + datetime.timedelta(i)) for i in range(len(GENERIC))]
    assert all({*CORE} < {*names} for names in days)
    assert {name for names in days for name in names} == {*GENERIC}
    assert todays(day, "all") == GENERIC
    assert todays(day, "bart,vit") == ["bart", "vit"]
