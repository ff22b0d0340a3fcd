"""The plan: JSON and back, identity, composition, difference, and what it refuses."""

from __future__ import annotations

import json
import random
from dataclasses import FrozenInstanceError

import pytest
from tiny import changed, cut_everywhere, snapshot, tiny, tiny_batch

from hf_prune import PruningConfig, PruningPlan, describe, prune
from hf_prune.checkpoint.history import pack, unpack
from hf_prune.plan import Kept

KEY = ("decoder", 0, "attention")


def site(kept, of=8, axis="heads", where=KEY):
    return Kept(where, axis, of, tuple(kept))


def plan(*kept, **more):
    return PruningPlan("llama", kept, **more)


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
    entry = {"where": ["decoder", 0, "attention"], "axis": "heads", "of": 8, "kept": [0, 2]}
    assert data == {"format": 2, "model_type": "llama", "kept": [entry], "config": {}, "cost": {}}


def test_hash_is_of_the_decision_alone():
    sites = [site([0, 1], where=("decoder", layer, "attention")) for layer in range(12)]
    shuffled = random.Random(0).sample(sites, len(sites))
    assert plan(*sites).hash == plan(*shuffled).hash == plan(*sites, config={"keep": 0.5}, cost={"keep": 1}).hash
    assert plan(*sites).hash != plan(*sites[:-1], site([0, 2], where=sites[-1].where)).hash
    assert len(plan(*sites).hash) == 64


def test_compose_is_indexing_twice():
    rng = random.Random(0)
    for _ in range(50):
        first = sorted(rng.sample(range(20), rng.randint(1, 20)))
        second = sorted(rng.sample(range(len(first)), rng.randint(1, len(first))))
        both = plan(site(first, of=20, axis="neurons")).compose(plan(site(second, of=len(first), axis="neurons")))
        assert both[KEY] == site([first[i] for i in second], of=20, axis="neurons")


def test_compose_groups_then_heads():
    """8 heads in 4 groups: keep groups 1 and 3 (heads 2, 3, 6, 7), then heads 0 and 2 of those."""
    both = plan(site([1, 3], of=4, axis="kv_groups")).compose(plan(site([0, 2], of=4)))
    assert both[KEY] == site([2, 6], of=8)


def test_compose_heads_then_groups():
    """8 heads in 4 groups: keep one head a group, then groups 0 and 3."""
    both = plan(site([0, 3, 5, 6])).compose(plan(site([0, 3], of=4, axis="kv_groups")))
    assert both[KEY] == site([0, 6])


def drawn(rng, count):
    return sorted(rng.sample(range(count), rng.randint(1, count)))


def random_plan(rng, widths, tokens):
    """Layers (or not), tokens (or not), and units of every layer that stays; and what is left of each dense layer."""
    layers = drawn(rng, len(widths)) if rng.random() < 0.8 else list(range(len(widths)))
    units = {layer: drawn(rng, widths[layer]) for layer in layers}
    kept = [site(units[layer], widths[layer], "neurons", ("decoder", layer, "ffn")) for layer in layers]
    if len(layers) < len(widths):
        kept.append(site(layers, len(widths), "layers", ("decoder",)))
    words = drawn(rng, tokens) if rng.random() < 0.8 else list(range(tokens))
    if len(words) < tokens:
        kept.append(site(words, tokens, "tokens", ()))
    return plan(*rng.sample(kept, len(kept))), layers, units, words


@pytest.mark.parametrize("seed", range(100))
def test_plans_of_layers_tokens_and_units_compose_as_indexing_twice(seed):
    rng = random.Random(seed)
    first, layers, units, words = random_plan(rng, [rng.randint(2, 9) for _ in range(6)], 12)
    then, again, narrowed, fewer = random_plan(rng, [len(units[layer]) for layer in layers], len(words))
    both = first.compose(then)
    wanted = {layers[i]: tuple(units[layers[i]][j] for j in narrowed[i]) for i in again}
    assert {kept.where[1]: kept.kept for kept in both.sites} == wanted
    assert both.layers("decoder", 6) == tuple(wanted)
    tokens = both.get(())
    assert (tuple(range(12)) if tokens is None else tokens.kept) == tuple(words[i] for i in fewer)
    assert PruningPlan.from_json(both.to_json()) == both
    assert unpack("llama", pack(both)) == both


def test_a_layer_that_the_first_plan_does_not_leave_is_refused():
    first = plan(site([0], 2, "layers", ("decoder",)), site([0, 1]))
    with pytest.raises(ValueError, match=r"decoder layer 1 attention: the first plan leaves 1 layers"):
        first.compose(plan(site([0], of=2, where=("decoder", 1, "attention"))))


def test_units_of_a_layer_that_goes_are_refused():
    with pytest.raises(ValueError, match=r"decoder layer 0 attention: the plan drops that layer"):
        plan(site([1], 2, "layers", ("decoder",)), site([0]))


def test_summary_names_layers_and_tokens():
    text = plan(site([0, 2], 4, "layers", ("decoder",)), site(range(3), 1200, "tokens", ())).summary()
    assert text.splitlines() == ["decoder layers: 2 of 4 (without 1, 3)", "tokens: 3 of 1,200"]


def test_compose_keeps_sites_that_the_second_plan_leaves_out():
    other = site([1], where=("decoder", 1, "attention"))
    assert plan(site([0, 1]), other).compose(plan(site([1], of=2)))[other.where] == other


def test_compose_refuses_a_plan_for_other_sizes():
    with pytest.raises(ValueError, match="made for 4 heads, the first keeps 2"):
        plan(site([0, 1])).compose(plan(site([0], of=4)))


def test_diff():
    same = site([0], where=("decoder", 1, "attention"))
    a, b = plan(site([0, 1, 2]), same), plan(site([1, 2, 3]), same)
    assert list(a.diff(b)) == [(KEY, (0,), (3,))]
    assert list(a.diff(a)) == []


def test_diff_of_layers_and_of_what_only_one_plan_names():
    other = site([0, 1], where=("decoder", 1, "attention"))
    whole, shorter = plan(site([0, 1]), other), plan(site([0, 1]), site([0], 2, "layers", ("decoder",)))
    assert list(whole.diff(shorter)) == [(other.where, (0, 1), ()), (("decoder",), (1,), ())]
    assert list(shorter.diff(whole)) == [(("decoder",), (), (1,)), (other.where, (), (0, 1))]


def test_identity():
    assert plan(site(range(8))).is_identity
    assert not plan(site(range(7))).is_identity


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        plan(site([0])).model_type = "bert"
    with pytest.raises(FrozenInstanceError):
        site([0]).kept = (1,)


def test_summary_names_counts_per_stack_and_kind():
    text = plan(site([0, 1]), site([0], where=("decoder", 1, "attention"))).summary()
    assert text == "decoder attention: 2, 1 of 8 heads in 2 layers"


@pytest.mark.parametrize("kept", [[1, 0], [0, 0], [-1], [8]])
def test_bad_indices(kept):
    with pytest.raises(ValueError, match=r"decoder layer 0 attention: .*0\.\.7"):
        site(kept)


def test_nothing_kept():
    with pytest.raises(ValueError, match="keep at least one of the heads"):
        site([])


@pytest.mark.parametrize("axis", [None, 3, "", ["heads"]], ids=repr)
def test_an_axis_is_a_word(axis):
    with pytest.raises(ValueError, match="an axis is a word"):
        site([0], axis=axis)


@pytest.mark.parametrize("of", [None, "8", 8.0, True, -8], ids=repr)
def test_a_number_of_units_is_a_whole_number(of):
    with pytest.raises(ValueError, match="`of` a whole number"):
        site([0], of=of)


@pytest.mark.parametrize(
    "where",
    [None, 3, ["decoder", 0], ["decoder", 0, "ffn", 1], ["decoder", "0", "ffn"], ["decoder", -1, "ffn"],
     ["decoder", True, "ffn"], [0, 0, "ffn"], {"decoder": 0}],
    ids=repr,
)  # fmt: skip
def test_a_place_is_of_a_site_of_layers_or_of_the_vocabulary(where):
    with pytest.raises(ValueError, match="is no place"):
        site([0], where=where)


def test_a_site_twice():
    with pytest.raises(ValueError, match="twice"):
        plan(site([0]), site([1]))


def test_a_newer_format():
    data = {**plan(site([0])).to_dict(), "format": 3}
    with pytest.raises(ValueError, match="format 3 is not 1 or 2"):
        PruningPlan.from_dict(data)


def test_check():
    made = plan(site([0]))
    made.check("llama", {KEY: {"heads": 8}})
    with pytest.raises(ValueError, match=r"'llama', the model is 'bert'"):
        made.check("bert", {KEY: {"heads": 8}})
    with pytest.raises(ValueError, match=f"{made.hash[:12]}.*plan 8 heads, model 6"):
        made.check("llama", {KEY: {"heads": 6}})
    with pytest.raises(ValueError, match="plan 8 heads, model none there"):
        made.check("llama", {})
    with pytest.raises(ValueError, match="not in the plan"):
        made.check("llama", {KEY: {"heads": 8}, ("decoder", 1, "ffn"): {"neurons": 4}})


# --- edited plans ----------------------------------------------------------------------------------------------------

NAN = float("nan")
IN_A_PLACE = {
    0: [None, 3, "", [], "encoder"],
    1: ["0", 0.0, -1, True, None, 2, 10**30, NAN],
    2: [None, 3, "x", "cross_attention", []],
}  # fmt: skip
OF = [None, "4", 4.0, True, -4, 0, 3, 10**30, NAN]
UNITS = [
    None, 3, "012", [], [0.0], [True, False], ["0"], [None], [[0]], {"0": 1}, NAN, [NAN], [3, 0], [0, 0], [-1], [4],
    [10**30], [0, 1, 2],
]  # fmt: skip
KEPT = {
    "where": [None, 3, "", "decoder", [], [[]], ["decoder"], ["decoder", 0], {}, NAN],
    "axis": [None, 3, "head", "neurons", "kv_groups", ["heads"]],
    "of": OF,
    "kept": UNITS,
}  # fmt: skip
SITE_OF_FORMAT_1 = {
    "stack": IN_A_PLACE[0],
    "layer": IN_A_PLACE[1],
    "kind": IN_A_PLACE[2],
    "unit": [None, 3, "heads", "neuron", ["head"]],
    "of": OF,
    "kept": UNITS,
}  # fmt: skip
PLACES = [None, 3, {}, "x", [], [None], [1], ["a"], [[]]]
PLAN = {
    "model_type": [None, 3, "", "bert", ["llama"]],
    "config": [None, 3, "x", [], {"keep": "a"}, {"keep": NAN}, {"criterion": 3}, {"repair": "bias"}, {"rounds": 2.5},
               {"x": {1}}],
    "cost": [None, 3, "x", [], {"x": {1}}, {"x": object()}],
}  # fmt: skip


def edited(data, path, value):
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return data


def values_at(table, *path):
    return [((*path, name), value) for name, values in table.items() for value in values]


EDITS = [
    *values_at(KEPT, "kept", 0), *values_at(IN_A_PLACE, "kept", 0, "where"),
    *values_at({**PLAN, "format": [None, 0, 1, 3, "2", [], NAN], "kept": PLACES}),
]  # fmt: skip
EDITS_OF_FORMAT_1 = [
    *values_at(SITE_OF_FORMAT_1, "sites", 0),
    *values_at({**PLAN, "format": [None, 0, 2, 3, "1", [], NAN], "sites": PLACES}),
]


def as_format_1(made):
    """The mapping that hf_prune wrote for a plan before it had axes."""
    words = {"heads": "head", "kv_groups": "kv_group", "neurons": "neuron"}
    sites = [
        dict(zip(("stack", "layer", "kind"), kept.where, strict=True))
        | {"unit": words[kept.axis], "of": kept.of, "kept": list(kept.kept)}
        for kept in made.kept
    ]
    rest = {"config": dict(made.config), "cost": dict(made.cost)}
    return {"format": 1, "model_type": made.model_type, "sites": sites, **rest}


@pytest.fixture(scope="module")
def llama():
    return tiny("LlamaForCausalLM")


def refused(model, data):
    """An error of ours, ValueError, before anything has changed."""
    before = snapshot(model)
    with pytest.raises(ValueError) as problem:
        prune(model, [tiny_batch(model)], plan=PruningPlan.from_dict(data))
    assert list(changed(before, model)) == []
    assert not hasattr(model, "_hf_prune")
    assert "/hf_prune/" in str(problem.traceback[-1].path)
    assert len(str(problem.value)) < 600


@pytest.mark.parametrize(("path", "value"), EDITS, ids=lambda value: f"{value!r:.24}")
def test_an_edited_value_is_refused_before_anything_changes(llama, path, value):
    refused(llama, edited(cut_everywhere(describe(llama)).to_dict(), path, value))


@pytest.mark.parametrize(("path", "value"), EDITS_OF_FORMAT_1, ids=lambda value: f"{value!r:.24}")
def test_an_edited_value_of_format_1_is_refused_too(llama, path, value):
    refused(llama, edited(as_format_1(cut_everywhere(describe(llama))), path, value))


WRITERS = {"kept": PruningPlan.to_dict, "sites": as_format_1}  # name of the list -> what writes it
writers = pytest.mark.parametrize("name", list(WRITERS))


@pytest.mark.parametrize(
    "edit",
    [
        lambda data, places: places.pop(),
        lambda data, places: places.append(places[0]),
        lambda data, places: places.sort(key=str) or places.insert(0, places.copy()),
        *(lambda data, places, key=key: data.pop(key) for key in ("format", "model_type", "kept")),
        *(lambda data, places, key=key: places[1].pop(key) for key in ("where", "axis", "of", "kept")),
        lambda data, places: places.append({**places[0], "where": ["decoder", 9, "attention"]}),
        lambda data, places: places[0].update(axis="heads", of=4, kept=[0, 1, 2]),
    ],
)
def test_what_is_missing_twice_or_uneven_is_refused(llama, edit):
    data = cut_everywhere(describe(llama)).to_dict()
    edit(data, data["kept"])
    refused(llama, data)


@pytest.mark.parametrize(
    "edit",
    [
        lambda data, sites: sites.pop(),
        lambda data, sites: sites.append(sites[0]),
        lambda data, sites: sites.sort(key=str) or sites.insert(0, sites.copy()),
        *(lambda data, sites, key=key: data.pop(key) for key in ("format", "model_type", "sites")),
        *(lambda data, sites, key=key: sites[1].pop(key) for key in ("stack", "layer", "kind", "unit", "of", "kept")),
        lambda data, sites: sites.append({**sites[0], "layer": 9}),
        lambda data, sites: sites[0].update(unit="head", of=4, kept=[0, 1, 2]),
    ],
)
def test_what_is_missing_twice_or_uneven_in_format_1_is_refused(llama, edit):
    data = as_format_1(cut_everywhere(describe(llama)))
    edit(data, data["sites"])
    refused(llama, data)


@writers
@pytest.mark.parametrize("edit", [
    lambda data, places: data.update(note="mine"),
    lambda data, places: places[0].update(note="mine"),
    lambda data, places: places.reverse(),
    lambda data, places: data.pop("config") and None,
    lambda data, places: data.update(cost={"metric": 3, "before": None, "keep": "x"}),
    lambda data, places: places[1].update(kept=[47]),
])  # fmt: skip
def test_what_does_not_touch_the_decision_is_a_right_result(name, edit):
    model = tiny("LlamaForCausalLM")
    data = WRITERS[name](cut_everywhere(describe(model)))
    edit(data, data[name])
    plan = PruningPlan.from_dict(data)
    assert PruningPlan.from_json(plan.to_json()) == plan
    prune(model, [tiny_batch(model)], PruningConfig(repair="none"), plan=plan)
    sizes = describe(model).sizes
    assert {kept.where: sizes[kept.where][kept.axis] for kept in plan.kept} == {k.where: len(k.kept) for k in plan.kept}


@pytest.mark.parametrize("data", [None, 3, "x", [], {}, True], ids=repr)
def test_a_plan_is_read_from_a_mapping(data):
    with pytest.raises(ValueError, match=r"A plan is a mapping|Plan format"):
        PruningPlan.from_dict(data)


@pytest.mark.parametrize("given", ["plan.json", b"x", 3, {}, {"format": 1}, []], ids=repr)
def test_only_a_plan_is_replayed_composed_and_compared(llama, given):
    before = snapshot(llama)
    with pytest.raises(TypeError, match=r"A plan is a PruningPlan, got .*PruningPlan\.load"):
        prune(llama, [tiny_batch(llama)], plan=given)
    assert list(changed(before, llama)) == []
    for call in (plan(site([0])).compose, lambda other: list(plan(site([0])).diff(other))):
        with pytest.raises(TypeError, match="A plan is a PruningPlan"):
            call(given)


def test_two_plans_of_different_models_do_not_compose():
    first = plan(site([0, 1]))
    with pytest.raises(ValueError, match=r"a bert's, the first a llama's"):
        first.compose(PruningPlan("bert", (site([0], of=2),)))
    with pytest.raises(ValueError, match=r"has no \('decoder', 7"):
        first.compose(plan(site([0], of=2, where=("decoder", 7, "attention"))))
    with pytest.raises(ValueError, match=r"made for 2 neurons, the first keeps 2 heads"):
        first.compose(plan(site([0], of=2, axis="neurons")))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"3", b"[]", b'"x"', b"null", b"NaN", b"[" * 100_000, b"\xff\xfe\x00", b'{"format": 1}', b"{}",
     b'{"format": ' + b"9" * 5000 + b"}", b'{"format": 1, "model_type": "llama", "sites": [{}]}'],
    ids=lambda content: f"{content!r:.20}",
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"plan\.json"):
        PruningPlan.load(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        PruningPlan.load(tmp_path / "none")
    with pytest.raises(IsADirectoryError, match="a file is needed"):
        PruningPlan.load(tmp_path)
    with pytest.raises(TypeError, match="named by a path, got int"):
        PruningPlan.load(3)
    with pytest.raises(ValueError, match="The plan is no JSON"):
        PruningPlan.from_json(3)


def test_a_site_that_is_not_there_is_named():
    with pytest.raises(KeyError, match=r"no place .*'ffn'.*it has .*attention"):
        plan(site([0]))["decoder", 0, "ffn"]


@pytest.mark.parametrize("sites", [3, None, [{}], ["a"], "ab"], ids=repr)
def test_a_plan_is_built_from_sites(sites):
    with pytest.raises(ValueError, match=r"A plan's 'kept'|A plan holds Kept"):
        PruningPlan("llama", sites)
