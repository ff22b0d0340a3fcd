"""The two streams that a repair advances are the dense and the pruned model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import FAMILY_NAMES, cut_everywhere, tiny_batch, tiny_model

from hf_prune import describe, layerwise
from hf_prune.anatomy import quiet
from hf_prune.batches import draw, forward_inputs, token_mask
from hf_prune.oneshot import _by_layer, _layers
from hf_prune.plan import PruningPlan
from hf_prune.sequential import StackRepair

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens:UserWarning")


def only(plan: PruningPlan, what: str) -> PruningPlan:
    """The plan with all but the sites of one sort left whole."""
    keeps = {"heads": lambda site: site.unit == "neuron", "neurons": lambda site: site.unit != "neuron"}.get(what)
    whole = [replace(s, kept=tuple(range(s.of))) if keeps and keeps(s) else s for s in plan.sites]
    return replace(plan, sites=tuple(whole))


def final_states(model, layers, inputs) -> list[torch.Tensor]:
    stream = layerwise.capture(model, layers, inputs)
    for layer, kwargs in zip(layers, stream.kwargs, strict=True):
        for batch, state in enumerate(stream.states):
            stream.states[batch] = layerwise.run(layer, state, kwargs[batch])[layerwise.OUTPUT]
    return stream.states


@pytest.mark.parametrize("what", ["everything", "heads", "neurons"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_both_streams_end_where_the_models_do(family: str, what: str) -> None:
    model = tiny_model(family)
    anatomy = describe(model)
    plan = only(cut_everywhere(anatomy), what)
    stack = anatomy.sites[0].stack
    batches = draw(model, [tiny_batch(model, batch=10)], samples=10, seed=0)
    inputs = [forward_inputs(model, batch) for batch in batches]
    layers = _layers(model, anatomy, stack)
    with quiet(model), torch.no_grad():
        before = final_states(model, layers, inputs)
        dense = layerwise.capture(model, layers, inputs)
        masks, held_out = [token_mask(model, b, stack) for b in batches], [b.held_out for b in batches]
        offset = anatomy.family.norm_offset
        work = StackRepair(plan, "least_squares", dense, dense.copy(), masks, held_out, offset)
        work.run_(layers, _by_layer(anatomy, stack))
        after = final_states(model, layers, inputs)
    for found, wanted in ((work.dense.states, before), (work.pruned.states, after)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))
