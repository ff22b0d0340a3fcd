"""The design, on a model that nobody wrote code for: masked == cut == reloaded, from its row alone."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import ROW, ToyModel, toy_model

from hf_prune import describe
from hf_prune.checkpoint.layout import write_
from hf_prune.decide.costs import cost_model, planned_sizes
from hf_prune.execute import Repair, execute_
from hf_prune.model.families import FAMILIES
from hf_prune.model.mask import masked
from hf_prune.plan import Kept, PruningPlan

KEPT = {"channels": range(0, 12, 3), "experts": (0, 2, 3), "neurons": (1, 2, 5), "layers": (0, 2, 3)}
TOKENS = tuple(range(3, 40, 2))


@pytest.fixture(autouse=True)
def toy_row(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", ROW)


def plan_of(anatomy, *axes):
    """A plan that cuts these axes and leaves the others whole."""
    kept = []
    for extent in anatomy.extents:
        if extent.axis.name in axes:
            kept.append(Kept(extent.where, extent.axis.name, extent.of, TOKENS if not extent.path else KEPT["layers"]))
    for site in anatomy.sites:
        axis = site.inner.name
        if "layers" not in axes or site.layer in KEPT["layers"]:
            kept.append(Kept(site.key, axis, site.sizes[axis], KEPT[axis] if axis in axes else range(site.sizes[axis])))
    return PruningPlan("toy", tuple(kept))


@pytest.mark.parametrize(
    "axes",
    [
        ("channels",), ("experts",), ("neurons",), ("layers",), ("tokens",),
        ("channels", "experts", "neurons", "layers", "tokens"),
    ],
)  # fmt: skip
def test_a_row_is_enough(axes, tmp_path):
    model, ids = toy_model(), torch.tensor([TOKENS[:8], TOKENS[5:13]])
    dense, anatomy = copy.deepcopy(model), describe(model)
    plan = plan_of(anatomy, *axes)
    with torch.no_grad(), masked(dense, anatomy, plan):
        wanted = dense(ids)[0]
    with torch.no_grad():
        assert torch.equal(dense(ids)[0], toy_model()(ids)[0])  # the masks are gone
    if "tokens" in axes:
        wanted, ids = wanted[..., list(TOKENS)], torch.tensor([[TOKENS.index(i) for i in row] for row in ids.tolist()])
    execute_(model, anatomy, plan, Repair())
    write_(model, ROW, {})
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], wanted, rtol=1e-5, atol=1e-5)
    assert (model.embed.weight is model.head.weight) == (dense.embed.weight is dense.head.weight)
    model.save_pretrained(tmp_path)
    reloaded = ToyModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids)[0], model(ids)[0], rtol=0, atol=0)
    assert describe(reloaded).sizes == describe(model).sizes
    if not {"experts", "neurons"} <= {*axes}:  # two sites on the same tensors: not a sum
        for metric in ("params", "bytes"):
            cost = cost_model(anatomy, metric, 8, "model").total(planned_sizes(anatomy, plan))
            assert cost == sum(p.numel() * (p.element_size() if metric == "bytes" else 1) for p in model.parameters())


def test_the_row_is_cut_wrongly_if_it_lies(tmp_path, monkeypatch):
    """The test above can fail: gate and up are said to lie one after the other, where they alternate."""
    from dataclasses import replace

    from toy import WIDTHS

    from hf_prune.model.axes import Part

    lie = replace(WIDTHS, parts=(Part("experts.gate_up", 1, ("neurons", "neurons")), WIDTHS.parts[1]))
    stack = replace(ROW.stacks[0], sublayers=(*ROW.stacks[0].sublayers[:2], lie))
    monkeypatch.setitem(FAMILIES, "toy", replace(ROW, stacks=(stack,)))
    model, ids = toy_model(), torch.tensor([TOKENS[:8]])
    dense, anatomy = copy.deepcopy(model), describe(model)
    plan = plan_of(anatomy, "neurons")
    with torch.no_grad(), masked(dense, anatomy, plan):
        wanted = dense(ids)[0]
    execute_(model, anatomy, plan, Repair())
    with torch.no_grad():
        assert (model(ids)[0] - wanted).abs().max() > 1e-2
