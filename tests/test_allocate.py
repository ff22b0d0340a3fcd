"""Allocation: against brute force, alignment, what stock can say, and what cannot be reached."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tiny import FAMILY_NAMES, tiny, tiny_batch, tiny_model, within_reach

from hf_prune import PruningConfig, describe
from hf_prune.decide.allocate import _comparable, allocate, reachable
from hf_prune.decide.costs import cost_model, planned_sizes
from hf_prune.decide.knapsack import Table, knapsack
from hf_prune.decide.ranking import Ranking, rearranged
from hf_prune.decide.units import choose_units, default_align, unit_of
from hf_prune.oneshot import analyze

SHAPES = ("stock", "uniform", "per_layer")


def random_tables(rng, count, options):
    """Tables as allocation makes them: more kept units cost more and lose less."""
    return [
        Table(
            loss=np.sort(rng.random(options))[::-1].copy(),
            cost=np.cumsum(rng.integers(1, 20, options)).astype(float),
        )
        for _ in range(count)
    ]


def brute_force(tables, budget):
    choices = itertools.product(*(range(len(table.cost)) for table in tables))
    losses = [
        sum(t.loss[i] for t, i in zip(tables, choice, strict=True))
        for choice in choices
        if sum(t.cost[i] for t, i in zip(tables, choice, strict=True)) <= budget
    ]
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(30))
def test_knapsack_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, count=int(rng.integers(1, 5)), options=int(rng.integers(1, 7)))
    least, most = sum(t.cost.min() for t in tables), sum(t.cost.max() for t in tables)
    for budget in (least - 1, least, (least + most) / 2, most, most + 1):
        chosen, best = knapsack(tables, budget), brute_force(tables, budget)
        if best is None:
            assert chosen is None
            continue
        assert sum(t.cost[i] for t, i in zip(tables, chosen, strict=True)) <= budget
        assert sum(t.loss[i] for t, i in zip(tables, chosen, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_frontier_stays_within_a_small_gap(seed, monkeypatch):
    """With 64 points instead of 2048 the answer is within 5% of the best."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, count=7, options=6)
    budget = 0.5 * sum(t.cost.max() for t in tables)
    best = sum(t.loss[i] for t, i in zip(tables, knapsack(tables, budget), strict=True))
    assert best == pytest.approx(brute_force(tables, budget))
    monkeypatch.setattr("hf_prune.decide.knapsack.FRONTIER", 64)
    thinned = knapsack(tables, budget)
    assert sum(t.cost[i] for t, i in zip(tables, thinned, strict=True)) <= budget
    assert sum(t.loss[i] for t, i in zip(tables, thinned, strict=True)) <= 1.05 * best


@pytest.mark.parametrize("seed", range(10))
def test_ranking_keeps_the_best_heads_evenly_in_each_group(seed):
    """Against all ways to keep g groups with r heads each."""
    scores = np.random.default_rng(seed).random((3, 4))
    counts = tuple(itertools.product((1, 2, 3), (1, 2, 3, 4)))
    ranking = Ranking("heads", scores, counts)
    for (groups, each), loss in zip(counts, ranking.losses(), strict=True):
        ways = [
            [g * 4 + i for g, row in zip(chosen, rows, strict=True) for i in row]
            for chosen in itertools.combinations(range(3), groups)
            for rows in itertools.product(itertools.combinations(range(4), each), repeat=groups)
        ]
        best = max(ways, key=lambda kept: scores.ravel()[kept].sum())
        assert ranking.kept((groups, each)) == tuple(best)
        assert loss == pytest.approx(scores.sum() - scores.ravel()[best].sum())


MANY_HEADS, ONE_GROUP = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("class_name", "changes", "shapes", "expected"),
    [
        ("BertForMaskedLM", {}, "stock", ["neurons"]),
        ("BertForMaskedLM", {}, "uniform", ["neurons", "heads"]),
        ("ViTForImageClassification", {}, "stock", ["neurons", "heads"]),
        ("T5ForConditionalGeneration", {}, "stock", ["neurons", "heads"]),
        ("LlamaForCausalLM", {}, "stock", ["neurons", "kv_groups"]),
        ("LlamaForCausalLM", MANY_HEADS, "stock", ["neurons", "heads"]),
        ("LlamaForCausalLM", ONE_GROUP, "stock", ["neurons", "heads"]),
        ("Phi3ForCausalLM", ONE_GROUP, "per_layer", ["neurons", "heads"]),
    ],
)
def test_by_default_attention_goes_in_the_largest_units_that_leave_a_choice(class_name, changes, shapes, expected):
    assert choose_units(describe(tiny(class_name, **changes)), PruningConfig(shapes=shapes)) == expected


@pytest.mark.parametrize("shapes", SHAPES)
def test_a_multi_query_model_loses_heads_too(shapes):
    """Its one KV head stays, so what is removed by default are the query heads that share it."""
    anatomy = describe(tiny("LlamaForCausalLM", **ONE_GROUP))
    config = PruningConfig(keep=0.3, metric="params", shapes=shapes)  # less than the attention alone
    sizes = planned_sizes(anatomy, allocate(anatomy, random_scores(anatomy, config), config, align=1))
    attention = [sizes[s.key] for s in anatomy.sites if s.inner.mixes]
    assert {found["kv_groups"] for found in attention} == {1}
    assert min(found["heads"] for found in attention) < 4


def random_scores(anatomy, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    units = choose_units(anatomy, config)
    return {s.key: torch.rand(s.sizes[unit_of(s, units)], generator=generator) for s in anatomy.sites}


@pytest.mark.parametrize("seed", range(5))
def test_uniform_plan_is_the_best_of_all_pairs(seed):
    """BERT, uniform: one head count and one width; every pair is tried by hand."""
    anatomy = describe(tiny("BertForMaskedLM"))
    config = PruningConfig(keep=0.7, shapes="uniform")
    scores = random_scores(anatomy, config, seed)
    plan = allocate(anatomy, scores, config, align=4)
    costs = cost_model(anatomy, "macs", 128, "model")
    dense = costs.total(anatomy.sizes)
    found = []
    for heads, width in itertools.product(range(1, 5), range(4, 49, 4)):
        keep = {s.key: heads if s.inner.mixes else width for s in anatomy.sites}
        if costs.total(anatomy.sizes | {s.key: s.counts(keep[s.key], 1) for s in anatomy.sites}) <= 0.7 * dense:
            found.append(sum(float(scores[k].sort().values[: len(scores[k]) - n].sum()) for k, n in keep.items()))
    removed = {s.where: set(range(s.of)) - set(s.kept) for s in plan.sites}
    assert sum(float(scores[k][list(r)].sum()) for k, r in removed.items() if r) == pytest.approx(min(found))
    assert plan.cost["predicted_loss"] == pytest.approx(min(found))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("align", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_align_and_equal_counts(family, shapes, align):
    anatomy = describe(tiny_model(family))
    config = within_reach(tiny_model(family), PruningConfig(metric="params", shapes=shapes, align=align))
    plan = allocate(anatomy, random_scores(anatomy, config), config, align)
    costs = cost_model(anatomy, "params", 128, "blocks")
    realised = costs.total(planned_sizes(anatomy, plan)) / costs.total(anatomy.sizes)
    assert realised <= config.keep + 1e-9  # `keep` lies on a reachable cost: rounding of the division
    widths = {len(s.kept) for s in plan.sites if s.axis == "neurons"}
    assert all(width % align == 0 or width == 48 for width in widths)
    if shapes != "per_layer":
        sizes = planned_sizes(anatomy, plan)
        for key in {axis.config for site in anatomy.sites for axis in site.row.axes}:
            found = {sizes[s.key][axis.name] for s in anatomy.sites for axis in s.row.axes if axis.config == key}
            assert len(found) == 1


def test_more_freedom_loses_no_more():
    anatomy = describe(tiny("BertForMaskedLM"))
    scores = random_scores(anatomy, PruningConfig(shapes="uniform"))
    uniform, per_layer = (
        allocate(anatomy, scores, PruningConfig(keep=0.6, shapes=shapes), align=4)
        for shapes in ("uniform", "per_layer")
    )
    assert per_layer.cost["predicted_loss"] <= uniform.cost["predicted_loss"] * 1.001


def test_stock_llama_keeps_head_counts_that_divide_hidden_size():
    """9 heads of hidden 36 (as SmolLM2's 9 of 576): stock may keep 1, 2, 3, 4, 6 or 9 of them."""
    model = tiny("LlamaForCausalLM", hidden_size=36, num_attention_heads=9, num_key_value_heads=9)
    anatomy = describe(model)
    seen = set()
    for keep in np.linspace(0.35, 1, 20):
        config = PruningConfig(keep=float(keep), metric="params", units=["heads", "neurons"])
        plan = allocate(anatomy, random_scores(anatomy, config), config, align=4)
        seen |= {len(s.kept) for s in plan.sites if s.axis == "heads"}
    assert seen <= {1, 2, 3, 4, 6, 9}
    assert len(seen) > 2


@pytest.mark.parametrize("shapes", SHAPES)
def test_reachable_is_the_true_minimum(family, shapes):
    """Just above it works, just below does not."""
    anatomy = describe(tiny_model(family))
    config = PruningConfig(metric="params", shapes=shapes)
    align = default_align(anatomy, "cpu")
    least = reachable(anatomy, config, align)
    at = PruningConfig(keep=least * 1.0001, metric="params", shapes=shapes)
    allocate(anatomy, random_scores(anatomy, at), at, align)
    below = PruningConfig(keep=least * 0.999, metric="params", shapes=shapes)
    with pytest.raises(ValueError, match=f"the least is {least:.3f}"):
        allocate(anatomy, random_scores(anatomy, below), below, align)


def test_unreachable_keep_names_the_other_shapes():
    model = tiny("LlamaForCausalLM", hidden_size=36, num_attention_heads=9, num_key_value_heads=9)
    with pytest.raises(ValueError, match=r"shapes='uniform' 0\.\d+, shapes='per_layer' 0\.\d+.*model_type='mistral'"):
        analyze(model, [tiny_batch(model)], PruningConfig(keep=0.01))


def test_scores_of_incomparable_criteria_are_normalised_per_site():
    """One site's scores a thousand times larger change nothing for magnitude-like criteria."""
    anatomy = describe(tiny("BertForMaskedLM"))
    config = PruningConfig(keep=0.7, shapes="per_layer")
    scores = random_scores(anatomy, config)
    first = anatomy.sites[0].key
    plans = [
        allocate(anatomy, {**scores, first: scores[first] * factor}, config, align=4, across="sum")
        for factor in (1, 1000)
    ]
    assert plans[0].hash == plans[1].hash


@pytest.mark.parametrize(("width", "expected"), [(3072, 32), (512, 32), (256, 16), (48, 2), (8, 1)])
def test_default_align_on_cpu(width, expected):
    anatomy = describe(tiny("BertForMaskedLM", intermediate_size=width))
    assert default_align(anatomy, "cpu") == expected


def test_several_keeps_from_one_pass():
    """Plans for other targets never run the model again."""
    model = tiny("BertForSequenceClassification")
    analysis = analyze(model, [tiny_batch(model)], PruningConfig(keep=1.0, shapes="uniform"))

    def explode(*_, **__):
        raise AssertionError("the model ran")

    model.forward = explode
    kept = [analysis.plan(keep).cost["keep"] for keep in (0.9, 0.7, 0.5)]
    assert [k <= keep for k, keep in zip(kept, (0.9, 0.7, 0.5), strict=True)] == [True] * 3
    assert kept == sorted(kept, reverse=True)


def removed_together(gates, kept):
    """Block-diagonal Fisher of removing all units but `kept`: mean over examples of the squared sum of gradients."""
    removed = [unit for unit in range(gates.shape[1]) if unit not in kept]
    return float((gates[:, removed].sum(1) ** 2).mean())


@pytest.mark.parametrize("seed", range(10))
def test_rearrangement_lowers_what_the_units_lose_together(seed):
    rng = np.random.default_rng(seed)
    gates = rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8))  # correlated
    alone = tuple(sorted(np.argsort(-(gates**2).sum(0), kind="stable")[:5].tolist()))
    together = rearranged(gates, 5)
    assert len(together) == 5
    best = min(removed_together(gates, kept) for kept in itertools.combinations(range(8), 5))
    assert best <= removed_together(gates, together) <= removed_together(gates, alone)


def test_rearrangement_removes_units_that_cancel_out():
    """Two units whose gradients cancel cost nothing together, whatever each costs alone."""
    g = np.random.default_rng(0).normal(size=50)
    gates = np.stack([5 * g, -5 * g, np.roll(g, 1)], 1)
    assert rearranged(gates, 1) == (2,)


def test_standard_scores_have_equal_spread_and_the_lowest_go_first_whatever_they_cost():
    g = torch.Generator().manual_seed(0)
    scores = {("encoder", i, "ffn"): torch.rand(20, generator=g) * 10**i + i for i in range(3)}
    sizes = {key: 20.0 * 7**index for index, key in enumerate(scores)}
    found = _comparable(scores, "standard", sizes)
    a_cost = {key: value / (sizes[key] / 20) for key, value in found.items()}
    assert min(value.min() for value in a_cost.values()) == 0
    for key, value in a_cost.items():
        assert value.std() == pytest.approx(1)
        assert value.argsort().tolist() == scores[key].argsort().tolist()


@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_ratio_takes_the_same_fraction_everywhere(shapes):
    """Whatever the scores say about how much each site matters."""
    anatomy = describe(tiny_model("bert"))
    g = torch.Generator().manual_seed(0)
    scores = {s.key: torch.rand(s.sizes[s.inner.name], generator=g) * 10.0**i for i, s in enumerate(anatomy.sites)}
    config = PruningConfig(keep=0.7, metric="params", shapes=shapes, allocation="ratio")
    plan = allocate(anatomy, scores, config, align=1)
    removed = [1 - len(site.kept) / site.of for site in plan.sites]
    coarsest = max(1 / site.of for site in plan.sites)
    assert max(removed) - min(removed) <= coarsest
    for site in plan.sites:
        kept = scores[site.where][list(site.kept)]
        assert kept.min() >= scores[site.where].sort(descending=True).values[len(site.kept) - 1]
