"""The two streams that a repair advances are the dense and the pruned model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import CORE, FAMILY_NAMES, by_layer, cut_everywhere, layers_of, tiny_batch, tiny_model

from hf_prune import describe
from hf_prune.model import layerwise
from hf_prune.model.batches import draw, forward_inputs, token_mask
from hf_prune.model.sites import readers
from hf_prune.model.weights import quiet
from hf_prune.plan import PruningPlan
from hf_prune.repair.walk import StackRepair
from hf_prune.score.statistics import rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens:UserWarning")


POST_NORM = ("bert", "distilbert", "bart")


def only(plan: PruningPlan, what: str) -> PruningPlan:
    """The plan with all but the sites of one sort left whole."""
    keeps = {"heads": lambda site: site.axis == "neurons", "neurons": lambda site: site.axis != "neurons"}.get(what)
    whole = [replace(s, kept=tuple(range(s.of))) if keeps and keeps(s) else s for s in plan.kept]
    return replace(plan, kept=tuple(whole))


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
    layers = layers_of(model, anatomy, stack)
    with quiet(model), torch.no_grad():
        before = final_states(model, layers, inputs)
        dense = layerwise.capture(model, layers, inputs)
        masks, held_out = [token_mask(model, b, stack) for b in batches], [b.held_out for b in batches]
        offset = anatomy.family.norm_offset
        work = StackRepair(plan, stack, "least_squares", dense, dense.copy(), masks, held_out, offset)
        work.run_(layers, by_layer(anatomy, stack))
        after = final_states(model, layers, inputs)
    for found, wanted in ((work.dense.states, before), (work.pruned.states, after)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_a_sublayer_reads_is_set_right(family: str) -> None:
    """A stream that was mixed by a matrix: what every sublayer of a layer makes of it comes closer to the dense one,
    and keys and values of cross-attention, which read another stream, are left alone."""
    model = tiny_model(family)
    anatomy = describe(model)
    stack = anatomy.sites[-1].stack
    batches = draw(model, [tiny_batch(model, batch=64, seed=seed) for seed in range(4)], samples=256, seed=0)
    layers = layers_of(model, anatomy, stack)
    sites = [site for site in by_layer(anatomy, stack)[0] if site.active]
    with quiet(model), torch.no_grad():
        dense = layerwise.capture(model, layers, [forward_inputs(model, batch) for batch in batches])
        mixed = dense.copy()
        width = dense.states[0].shape[-1]
        mixing = torch.eye(width) + 0.5 * torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width
        mixed.states = [state @ mixing for state in dense.states]
        masks, held_out = [token_mask(model, b, stack) for b in batches], [b.held_out for b in batches]
        work = StackRepair(cut_everywhere(anatomy), stack, "least_squares", dense, mixed, masks, held_out)

        def made(stream: layerwise.Stream, path: str) -> torch.Tensor:
            runs = zip(stream.states, stream.kwargs[0], masks, strict=True)
            return torch.cat(
                [
                    rows_of(layerwise.run(layers[0], state, kwargs, (), [path])[path], mask)
                    for state, kwargs, mask in runs
                ]
            )

        wanted = {path: made(dense, path) for site in sites for path in readers(site)}
        reads, _ = work._advance_dense(0, layers[0], sites)
        dense.states = []  # was advanced
        for site in sites:
            before = {path: (made(mixed, path) - wanted[path]).square().mean() for path in readers(site)}
            others = {name: value.clone() for name, value in layers[0].state_dict().items()}
            assert work._realign_(0, layers[0], site, reads[site.kind])
            for path, error in before.items():
                now = (made(mixed, path) - wanted[path]).square().mean()
                assert now < (error / 2 if site is sites[0] else error), path
            changed = {name for name, value in layers[0].state_dict().items() if not torch.equal(value, others[name])}
            assert {name.rpartition(".")[0] for name in changed} == set(before)


@pytest.mark.parametrize(
    ("family", "changes"), [*((name, {}) for name in FAMILY_NAMES), ("opt", {"do_layer_norm_before": False})]
)
def test_the_last_target_of_a_layer_is_what_the_layer_gives(family: str, changes: dict[str, bool]) -> None:
    """Before the norm that ends it, in post-LN layers: OPT's config chooses between the two."""
    model = tiny_model(family, **changes)
    anatomy = describe(model)
    stack = anatomy.sites[0].stack
    batches = draw(model, [tiny_batch(model, batch=10, padded=False)], samples=10, seed=0)
    layers, here = layers_of(model, anatomy, stack), by_layer(anatomy, stack)[0]
    with quiet(model), torch.no_grad():
        dense = layerwise.capture(model, layers, [forward_inputs(model, batch) for batch in batches])
        masks, held_out = [token_mask(model, b, stack) for b in batches], [b.held_out for b in batches]
        work = StackRepair(cut_everywhere(anatomy), stack, "least_squares", dense, dense.copy(), masks, held_out)
        _, targets = work._advance_dense(0, layers[0], here)
        last = here[-1]
        if not targets:
            pytest.skip("the layer gives more than the sum of its sublayers")
        target = targets[last.kind][0].view_as(dense.states[0])
        given = layers[0].get_submodule(last.row.norm)(target) if last.row.norm_place == "after" else target
    torch.testing.assert_close(given, dense.states[0], rtol=1e-4, atol=1e-4)
    if family in CORE or changes:
        assert (last.row.norm_place == "after") == (family in POST_NORM or bool(changes))
