"""The plan: JSON and back, identity, composition, difference, and what it refuses."""

from __future__ import annotations

import json
import random
from dataclasses import FrozenInstanceError

import pytest
from tiny import cut_everywhere, tiny

from hf_prune import PruningPlan, describe
from hf_prune.plan import SitePlan

KEY = ("decoder", 0, "attention")


def site(kept, of=8, unit="head", key=KEY):
    return SitePlan(*key, unit, of, tuple(kept))


def plan(*sites, **more):
    return PruningPlan("llama", sites, **more)


@pytest.mark.parametrize("uniform", [True, False])
def test_json_round_trip(class_name, uniform, tmp_path):
    made = cut_everywhere(describe(tiny(class_name)), uniform)
    again = PruningPlan.from_json(made.to_json())
    assert again == made
    assert again.hash == made.hash
    made.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_config_and_cost_travel_along():
    made = plan(site([0, 2]), config={"keep": 0.5}, cost={"keep": 0.48})
    again = PruningPlan.from_json(made.to_json())
    assert (again.config, again.cost) == ({"keep": 0.5}, {"keep": 0.48})


def test_json_is_the_documented_format():
    data = json.loads(plan(site([0, 2])).to_json())
    entry = {"stack": "decoder", "layer": 0, "kind": "attention", "unit": "head", "of": 8, "kept": [0, 2]}
    assert data == {"format": 1, "model_type": "llama", "sites": [entry], "config": {}, "cost": {}}


def test_hash_is_of_the_decision_alone():
    sites = [site([0, 1], key=("decoder", layer, "attention")) for layer in range(12)]
    shuffled = random.Random(0).sample(sites, len(sites))
    assert plan(*sites).hash == plan(*shuffled).hash == plan(*sites, config={"keep": 0.5}, cost={"keep": 1}).hash
    assert plan(*sites).hash != plan(*sites[:-1], site([0, 2], key=sites[-1].key)).hash
    assert len(plan(*sites).hash) == 64


def test_compose_is_indexing_twice():
    rng = random.Random(0)
    for _ in range(50):
        first = sorted(rng.sample(range(20), rng.randint(1, 20)))
        second = sorted(rng.sample(range(len(first)), rng.randint(1, len(first))))
        both = plan(site(first, of=20, unit="neuron")).compose(plan(site(second, of=len(first), unit="neuron")))
        assert both[KEY] == site([first[i] for i in second], of=20, unit="neuron")


def test_compose_groups_then_heads():
    """8 heads in 4 groups: keep groups 1 and 3 (heads 2, 3, 6, 7), then heads 0 and 2 of those."""
    both = plan(site([1, 3], of=4, unit="kv_group")).compose(plan(site([0, 2], of=4)))
    assert both[KEY] == site([2, 6], of=8)


def test_compose_heads_then_groups():
    """8 heads in 4 groups: keep one head a group, then groups 0 and 3."""
    both = plan(site([0, 3, 5, 6])).compose(plan(site([0, 3], of=4, unit="kv_group")))
    assert both[KEY] == site([0, 6])


def test_compose_keeps_sites_that_the_second_plan_leaves_out():
    other = site([1], key=("decoder", 1, "attention"))
    assert plan(site([0, 1]), other).compose(plan(site([1], of=2)))[other.key] == other


def test_compose_refuses_a_plan_for_other_sizes():
    with pytest.raises(ValueError, match="made for 4 heads, the first keeps 2"):
        plan(site([0, 1])).compose(plan(site([0], of=4)))


def test_diff():
    same = site([0], key=("decoder", 1, "attention"))
    a, b = plan(site([0, 1, 2]), same), plan(site([1, 2, 3]), same)
    assert list(a.diff(b)) == [(KEY, (0,), (3,))]
    assert list(a.diff(a)) == []


def test_identity():
    assert plan(site(range(8))).is_identity
    assert not plan(site(range(7))).is_identity


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        plan(site([0])).model_type = "bert"
    with pytest.raises(FrozenInstanceError):
        site([0]).kept = (1,)


def test_summary_names_counts_per_stack_and_kind():
    text = plan(site([0, 1]), site([0], key=("decoder", 1, "attention"))).summary()
    assert text == "decoder attention: 2, 1 of 8 heads in 2 layers"


@pytest.mark.parametrize("kept", [[1, 0], [0, 0], [-1], [8]])
def test_bad_indices(kept):
    with pytest.raises(ValueError, match=r"decoder layer 0 attention: .*0\.\.7"):
        site(kept)


def test_nothing_kept():
    with pytest.raises(ValueError, match="keep at least one head"):
        site([])


def test_unknown_unit():
    with pytest.raises(ValueError, match="'expert' is not one of head, kv_group, neuron"):
        site([0], unit="expert")


def test_a_site_twice():
    with pytest.raises(ValueError, match="twice"):
        plan(site([0]), site([1]))


def test_a_newer_format():
    data = {**plan(site([0])).to_dict(), "format": 2}
    with pytest.raises(ValueError, match="format 2 is not 1"):
        PruningPlan.from_dict(data)


def test_check():
    made = plan(site([0]))
    made.check("llama", {KEY: {"head": 8}})
    with pytest.raises(ValueError, match=r"'llama', the model is 'bert'"):
        made.check("bert", {KEY: {"head": 8}})
    with pytest.raises(ValueError, match=f"{made.hash[:12]}.*plan 8 heads, model 6"):
        made.check("llama", {KEY: {"head": 6}})
    with pytest.raises(ValueError, match="no such site"):
        made.check("llama", {})
    with pytest.raises(ValueError, match="not in the plan"):
        made.check("llama", {KEY: {"head": 8}, ("decoder", 1, "ffn"): {"neuron": 4}})
