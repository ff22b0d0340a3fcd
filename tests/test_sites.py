"""What a row says about tensors, as arithmetic: against indices and elements that are written out."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from tiny import cut, cut_everywhere, tiny

from hf_prune import describe
from hf_prune.decide.costs import planned_sizes
from hf_prune.model.axes import Axis, Part, Sublayer
from hf_prune.model.cut import cut_arguments, index_of, kept_columns, slice_
from hf_prune.model.sites import Site, _sizes, tensor_of

FUSED = Part("qkv.weight", 0, ("heads", "kv_groups", "kv_groups"))
READ = Part("o.weight", 1, ("heads",), "reads")
GROUPED = (Axis("kv_groups", "num_key_value_heads"), Axis("heads", "num_attention_heads"))
PLAIN = (Axis("heads", "num_attention_heads", alias="kv_groups"),)


def site(axes, sizes, parts=(READ,), widths=None, shapes=None):
    row = Sublayer("attention", axes, tuple(parts))
    widths = widths or dict.fromkeys(sizes, 1)
    return Site("decoder", 0, "attention", "layers.0", row, sizes, widths, tuple(parts), shapes or {})


def grouped(heads=6, groups=3, **more):
    return site(GROUPED, {"kv_groups": groups, "heads": heads}, **more)


# --- which units remain ----------------------------------------------------------------------------------------------


def test_a_group_takes_its_heads_along():
    assert grouped().expand("kv_groups", (0, 2)) == {"kv_groups": [0, 2], "heads": [0, 1, 4, 5]}


def test_a_group_goes_with_its_last_head():
    assert grouped().expand("heads", (1, 4)) == {"kv_groups": [0, 2], "heads": [1, 4]}
    assert grouped().expand("heads", (0, 3, 5)) == {"kv_groups": [0, 1, 2], "heads": [0, 3, 5]}


@pytest.mark.parametrize("kept", [kept for n in range(1, 7) for kept in itertools.combinations(range(6), n)])
def test_groups_that_stay_keep_the_same_number_of_heads(kept):
    """All 63 choices among 6 heads in 3 groups."""
    counts = {sum(unit // 2 == group for unit in kept) for group in range(3)} - {0}
    if len(counts) > 1:
        with pytest.raises(ValueError, match=r"remaining kv_groups must keep the same number of heads"):
            grouped().expand("heads", kept)
    else:
        assert grouped().expand("heads", kept)["heads"] == list(kept)


@pytest.mark.parametrize("word", ["heads", "kv_groups"])
def test_where_each_head_is_its_own_group_both_words_mean_it(word):
    assert site(PLAIN, {"heads": 4}).expand(word, (1, 3)) == {"heads": [1, 3]}


def test_the_neurons_of_a_large_model_are_counted_once():
    """Linear in their number: milliseconds, where counting every group among all units took a minute."""
    many = site((Axis("neurons", "intermediate_size"),), {"neurons": 40_000})
    started = time.process_time()
    assert many.expand("neurons", range(40_000)) == {"neurons": list(range(40_000))}
    assert time.process_time() - started < 2


# --- where they lie --------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_fused_matrix():
    """6 heads and 3 KV groups of 2 rows each: queries, keys, values, one block after the other."""
    rows = [(block, unit, j) for block, units in (("q", 6), ("k", 3), ("v", 3)) for unit in range(units) for j in "ab"]
    kept = {"heads": [0, 3, 5], "kv_groups": [0, 2]}
    found = index_of(FUSED, kept, {"heads": 6, "kv_groups": 3}, {"heads": 2, "kv_groups": 2})
    wanted = [i for i, (block, unit, _) in enumerate(rows) if unit in kept["heads" if block == "q" else "kv_groups"]]
    assert found.tolist() == wanted


def test_an_axis_that_stays_whole_need_not_be_named():
    sizes, widths = {"heads": 6, "kv_groups": 3}, {"heads": 2, "kv_groups": 2}
    found = index_of(FUSED, {"heads": [1]}, sizes, widths).tolist()
    assert found == [2, 3, *range(12, 24)]


def test_rows_of_a_unit_that_lie_together():
    """[head, (query, key, value), row]: one axis, three times as wide."""
    rows = [(head, which, j) for head in range(4) for which in "qkv" for j in range(2)]
    found = index_of(Part("qkv.weight", 0, ("heads",), times=3), {"heads": [0, 2]}, {"heads": 4}, {"heads": 2})
    assert found.tolist() == [i for i, (head, _, _) in enumerate(rows) if head in (0, 2)]


def test_one_entry_for_a_unit_that_is_wide_elsewhere():
    bias = Part("bias.weight", 1, ("heads",), "carries", single=True)
    assert index_of(bias, {"heads": [0, 2]}, {"heads": 4}, {"heads": 16}).tolist() == [0, 2]


def test_columns_of_the_consumer():
    wide = grouped(widths={"kv_groups": 2, "heads": 2})
    assert kept_columns(wide, "kv_groups", (1,)).tolist() == [4, 5, 6, 7]
    assert kept_columns(wide, "heads", (0, 5)).tolist() == [0, 1, 10, 11]


def test_arguments_are_sliced_and_what_was_given_is_not():
    found = next(s for s in describe(tiny("T5EncoderModel")).sites if s.row.arguments)
    bias, mask = torch.randn(2, 4, 3, 3), torch.ones(2, 3)
    given = {"position_bias": bias, "attention_mask": mask, "cache_position": None}
    sliced = cut_arguments(given, found, "heads", (0, 2))
    assert torch.equal(sliced["position_bias"], bias[:, [0, 2]])
    assert sliced["attention_mask"] is mask
    assert given["position_bias"] is bias
    assert cut_arguments({"position_bias": None}, found, "heads", (0,)) == {"position_bias": None}


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_dimension_of_any_tensor_is_sliced(dim):
    root = torch.nn.Module()
    root.experts = torch.nn.Parameter(torch.randn(4, 5, 6))
    root.register_buffer("mean", torch.arange(5.0))
    whole, index = root.experts.detach().clone(), torch.tensor([0, 2, 3])
    slice_(root, "experts", index, dim)
    slice_(root, "mean", index, 0)
    assert torch.equal(root.experts, whole.index_select(dim, index))
    assert isinstance(root.experts, torch.nn.Parameter)
    assert root.mean.tolist() == [0, 2, 3]
    assert "mean" in dict(root.named_buffers())


# --- how many there are ----------------------------------------------------------------------------------------------

WIDTHS = {"heads": 8, "kv_groups": 8}


@pytest.mark.parametrize("order", [(FUSED, READ), (READ, FUSED)], ids=["fused first", "fused last"])
def test_sizes_are_solved_from_a_fused_matrix(order):
    """[q | k | v] of 4 heads and 2 groups: the heads are told by the matrix that reads them."""
    shapes = {"qkv.weight": ((4 + 2 + 2) * 8, 32), "o.weight": (32, 4 * 8)}
    assert _sizes(order, shapes, WIDTHS) == {"heads": 4, "kv_groups": 2}


def test_sizes_of_equal_and_of_wide_blocks():
    equal = Part("c_attn.weight", 1, ("heads", "heads", "heads"))
    assert _sizes([equal], {"c_attn.weight": (32, 96)}, {"heads": 8}) == {"heads": 4}
    together = Part("qkv.weight", 0, ("heads",), times=3)
    assert _sizes([together], {"qkv.weight": (96, 32)}, {"heads": 8}) == {"heads": 4}
    single = Part("bias.weight", 1, ("heads",), "carries", single=True)
    assert _sizes([single], {"bias.weight": (32, 4)}, {"heads": 8}) == {"heads": 4}


@pytest.mark.parametrize(
    ("parts", "shapes"),
    [
        ([READ], {"o.weight": (32, 30)}),  # no whole number of heads
        ([READ, Part("q.weight", 0, ("heads",))], {"o.weight": (32, 32), "q.weight": (24, 32)}),  # not the same one
        ([FUSED], {"qkv.weight": (64, 32)}),  # nothing tells heads and groups apart
    ],
)
def test_tensors_that_whole_units_do_not_make_up_are_refused(parts, shapes):
    with pytest.raises(ValueError, match="the family row does not fit this model"):
        _sizes(parts, shapes, WIDTHS)


def test_a_model_that_another_tool_cut_unevenly_is_refused():
    model = tiny("LlamaForCausalLM")
    attention = model.model.layers[1].self_attn
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :24])
    with pytest.raises(ValueError, match=r"self_attn\.\w_proj\.weight.*does not fit"):
        describe(model)


# --- elements --------------------------------------------------------------------------------------------------------


def some_counts(each):
    """A few sizes of a site, the whole one among them."""
    groups, share = each.sizes[each.outer.name], each.share
    return [each.counts(g, r) for g in {1, (groups + 1) // 2, groups} for r in {1, share}]


def test_elements_are_products_over_dimensions(class_name):
    """Of the site as it is, those of its parameters; of any other, those of the shapes that it then has."""
    model = tiny(class_name)
    for each in describe(model).sites:
        layer = model.get_submodule(each.path)
        matrices = {part.tensor for part in each.parts if part.role != "carries"}
        tensors = {part.tensor: tensor_of(layer, part.tensor) for part in each.parts}
        assert each.elements(each.sizes) == pytest.approx(sum(t.numel() for t in tensors.values()))
        assert each.elements(each.sizes, matrices=True) == pytest.approx(sum(tensors[t].numel() for t in matrices))
        for counts in some_counts(each):
            shapes = each.resized(counts).shapes
            assert each.elements(counts) == pytest.approx(sum(math.prod(shape) for shape in shapes.values()))
            assert each.elements(counts, True) == pytest.approx(sum(math.prod(shapes[path]) for path in matrices))


def test_a_tensor_of_two_axes_is_a_product_of_both():
    """Experts, each with neurons: half of both is a quarter."""
    axes = (Axis("experts", "num_experts"), Axis("neurons", "width"))
    parts = [Part("down", 0, ("experts",)), Part("down", 2, ("neurons",), "reads")]
    found = site(axes, {"experts": 4, "neurons": 6}, parts, shapes={"down": (4, 5, 6)})
    assert found.elements({"experts": 4, "neurons": 6}) == 4 * 5 * 6
    assert found.elements({"experts": 2, "neurons": 3}) == pytest.approx(2 * 5 * 3)


def test_what_is_compared_counts_for_attention_alone(class_name):
    for each in describe(tiny(class_name)).sites:
        assert each.compared(each.sizes) == (2 * each.columns if each.inner.mixes else 0)


def test_a_resized_site_is_the_site_of_the_cut_model(class_name, cut_shapes):
    model = tiny(class_name)
    anatomy = describe(model)
    plan = cut_everywhere(anatomy, uniform=cut_shapes == "uniform")
    sizes = planned_sizes(anatomy, plan)
    wanted = tuple(each.resized(sizes[each.key]) for each in anatomy.sites)
    assert describe(cut(model, plan)).sites == wanted
