"""Carry out a plan on a live model: cut and repair its stacks, drop layers, shorten the vocabulary. In place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .decide.costs import planned_sizes
from .model import layerwise
from .model.along import cut_wide_
from .model.anatomy import Anatomy
from .model.batches import Batch, forward_inputs, token_mask
from .model.cut import cut_
from .model.depth import check_droppable, drop_layers_
from .model.embeddings import counted_from, cut_tokens_
from .model.offload import device_of, real
from .model.shelf import Shelf
from .model.sites import Extent, Site, holders_of
from .model.weights import quiet
from .model.wide import HIDDEN
from .plan import Kept, PruningPlan, Where, must_be_plan
from .repair.running import estimate_behind_, norms_of
from .repair.walk import StackRepair
from .repair.width import Channels, Outside, first_states
from .vocabulary.choice import token_configs
from .vocabulary.renumbering import named_in_configs, renumber_

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Repair:
    """What the weights that stay are fitted with: by which method, on which rows, and how much each token counts."""

    method: str = "none"
    batches: Sequence[Batch] = ()
    gradients: Mapping[Where, Sequence[torch.Tensor]] = field(default_factory=dict)  # squared, [B*T] per batch
    batch_norm: bool = False  # whether running statistics behind a cut are estimated again


def execute_(model: PreTrainedModel, anatomy: Anatomy, plan: PruningPlan, repair: Repair) -> list[dict[str, Any]]:
    """Leave of a model what the plan keeps, repaired; the reports of the repairs. The config's sizes of sites and the
    undoing of a cut that is stopped are the caller's."""
    reports: list[dict[str, Any]] = []
    estimated = repair.batch_norm and bool(repair.batches) and bool(norms_of(model))
    repaired, changes = repair.method != "none" or estimated, False
    with quiet(model), torch.no_grad():
        stacks = [extent for extent in anatomy.extents if extent.path]
        inputs = [forward_inputs(model, batch) for batch in repair.batches] if repaired else []
        shelf = Shelf.beside(model)
        read = stacks if repaired else []
        dense = {e.where: layerwise.capture(model, _layers(model, e), inputs, shelf) for e in read}
        outside = _outside(model, anatomy, plan, repair, inputs) if inputs else None
        _narrow_(model, anatomy, plan, outside)
        for extent in stacks:
            by_layer = [[site for site in anatomy.sites if site.path == path] for path in extent.layers]
            as_dense, changes = not changes, changes or _changes(plan, extent)
            if repaired and changes and dense[extent.where].states:  # none: no example reaches this tower
                # a later stack also reads what the stacks before it, cut by now, give
                layers = _layers(model, extent)
                pruned = dense[extent.where].copy() if as_dense else layerwise.capture(model, layers, inputs, shelf)
                if outside is not None:
                    pruned.states = shelf.list(first_states(model, extent.layers[0], inputs))
                reports += StackRepair(
                    plan,
                    extent.where[0],
                    repair.method,
                    dense.pop(extent.where),
                    pruned,
                    pruned.spread([token_mask(model, batch, extent.where[0]) for batch in repair.batches]),
                    pruned.spread([batch.held_out for batch in repair.batches]),
                    anatomy.family.norm_offset,
                    repair.gradients if pruned.loops == 1 else {},
                    None if outside is None else outside.channels,
                    repair.batch_norm,
                ).run_(layers, by_layer)
            else:
                _cut_sites_(model, plan, by_layer)
            kept = plan.layers(extent.where[0], extent.of)
            if len(kept) < extent.of:
                drop_layers_(model, extent, kept)
        if outside is not None:
            outside.finish_()
        if estimated and changes:
            estimate_behind_(model, [extent.path for extent in stacks], repair.batches)
        _shorten_(model, anatomy, plan, repair.batches)
    return reports


def _outside(
    model: PreTrainedModel, anatomy: Anatomy, plan: PruningPlan, repair: Repair, inputs: Sequence[Mapping[str, Any]]
) -> Outside | None:
    """What lies around the layers of a stream that becomes narrower, as it is in the dense model."""
    chosen = plan.get(HIDDEN)
    if chosen is None or chosen.is_identity:
        return None
    stack = next(extent for extent in anatomy.extents if extent.path)
    found = Outside(
        model,
        Channels(anatomy.extent(*HIDDEN), chosen.kept),
        stack.path,
        inputs,
        [token_mask(model, batch, stack.where[0]) for batch in repair.batches],
        [batch.held_out for batch in repair.batches],
        repair.method == "least_squares",
        anatomy.family.norm_offset,
    )
    found.watch()
    return found


def _narrow_(model: nn.Module, anatomy: Anatomy, plan: PruningPlan, outside: Outside | None) -> None:
    """Cut the axes that run through the whole model; of a stream that is repaired what lies in front of its layers."""
    for extent in (extent for extent in anatomy.extents if extent.is_wide):
        chosen = plan.get(extent.where)
        if chosen is not None and not chosen.is_identity:
            if outside is not None and extent.where == HIDDEN:
                outside.start_()
            else:
                cut_wide_(model, extent, chosen.kept)


def _changes(plan: PruningPlan, extent: Extent) -> bool:
    return any(not kept.is_identity for kept in plan.kept if kept.where[:1] in (extent.where, HIDDEN))


def _layers(model: nn.Module, extent: Extent) -> list[nn.Module]:
    return [model.get_submodule(path) for path in extent.layers]


def _cut_sites_(model: nn.Module, plan: PruningPlan, by_layer: Sequence[Sequence[Site]]) -> None:
    for site in (site for sites in by_layer for site in sites):
        chosen = plan.get(site.key)
        if chosen is not None and not chosen.is_identity:
            with real(*holders_of(model, site)):
                cut_(model.get_submodule(site.path), site, chosen.axis, chosen.kept)


def _shorten_(model: Any, anatomy: Anatomy, plan: PruningPlan, batches: Sequence[Batch]) -> None:
    chosen = plan.get(())
    if chosen is None or chosen.is_identity:
        return
    extent, ids = anatomy.extent(), {old: new for new, old in enumerate(chosen.kept)}
    rows = _of_kept_tokens(batches, ids)
    before = _first_output(model, rows, ids.keys()) if rows else None
    cut_tokens_(model, extent, chosen.kept)
    renumber_(token_configs(model), ids, extent.of)
    if before is not None:
        after = _first_output(model, [[ids[i] for i in row] for row in rows], range(len(ids)))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            raise RuntimeError(
                f"The shorter vocabulary gives other outputs (up to {float((before - after).abs().max()):.2e}): this "
                f"{anatomy.model_type} holds its tokens elsewhere, too. Nothing was changed."
            )


def _of_kept_tokens(batches: Sequence[Batch], ids: Mapping[int, int]) -> list[list[int]]:
    """Two rows of only kept tokens, of the same length, to compare the model on before and after."""
    for batch in batches:
        given = batch.inputs.get("input_ids")
        for row in given.tolist() if given is not None and given.dim() == 2 else ():
            tokens = [token for token in row if token in ids]
            if len(tokens) > 1:
                return [tokens, tokens[::-1]]
    return []


def _first_output(model: Any, rows: Sequence[Sequence[int]], tokens: Collection[int]) -> torch.Tensor:
    """The logits at these tokens, where the model predicts tokens, else its first output."""
    ids = torch.tensor(rows, device=device_of(model))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    output: torch.Tensor = model(**inputs)[0].float()
    return output[..., list(tokens)] if model.get_output_embeddings() is not None else output


def touched(model: nn.Module, anatomy: Anatomy, plan: PruningPlan) -> list[nn.Module]:
    """All modules that carrying out a plan may change."""
    if any(plan.get(extent.where) is not None for extent in anatomy.extents if extent.parts):
        return list(model.modules())
    paths = [extent.path for extent in anatomy.extents if extent.path]
    owners = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
    inside = (module for path in paths for module in model.get_submodule(path).modules())
    return list({id(module): module for module in (model, *owners, *inside)}.values())


def check_plan(model: Any, anatomy: Anatomy, plan: PruningPlan) -> None:
    """Raise ValueError for a plan that this model cannot be cut by. TypeError: it is none."""
    must_be_plan(plan)
    plan.check(anatomy.model_type, anatomy.words)
    tied: dict[tuple[str, str], tuple[int, ...]] = {}
    for site in (site for site in anatomy.sites if plan.get(site.key)):
        chosen = plan[site.key]
        site.expand(chosen.axis, chosen.kept)  # raises for heads unevenly over their groups
        if site.inner.tied and tied.setdefault((site.stack, site.kind), chosen.kept) != chosen.kept:
            raise ValueError(
                f"{site.name}: all {site.kind} sites of a {anatomy.model_type} {site.stack} must keep the same "
                f"{chosen.axis} (they share one position bias); the plan keeps {chosen.kept} here."
            )
    for extent in anatomy.extents:
        chosen_of = plan.get(extent.where)
        if chosen_of is None or chosen_of.is_identity:
            continue
        kept = {*chosen_of.kept}
        if extent.path:
            check_droppable(model, anatomy)
        if extent.is_wide:
            _check_width(anatomy, plan, extent, chosen_of)
        needed = {*extent.axis.fixed} if extent.where else _needed_tokens(model, extent)
        if not needed <= kept:
            raise ValueError(
                f"The plan drops {extent.axis.name} {sorted(needed - kept)[:10]} of this {anatomy.model_type}, which "
                "cannot go: the config names these tokens, or later layers read what that layer makes."
            )


def _check_width(anatomy: Anatomy, plan: PruningPlan, extent: Extent, chosen: Kept) -> None:
    """Raise ValueError where the stock class would build other shapes than a narrower stream leaves."""
    sizes, width = planned_sizes(anatomy, plan), len(chosen.kept)
    if extent.where != HIDDEN:
        return
    wrong = [site for site in anatomy.sites if site.key in sizes and not site.fits(sizes[site.key], width)]
    if wrong or width in extent.never:
        heads = f" beside {sizes[wrong[0].key]} units of {wrong[0].name}" if wrong else ""
        raise ValueError(
            f"The plan keeps {width} of {extent.of} hidden channels{heads}, which a stock {anatomy.model_type} cannot "
            "say: as many channels as its heads have together, or a multiple of their number. prune(...) with "
            "units=['hidden'] makes plans that fit."
        )


def _needed_tokens(model: Any, extent: Extent) -> set[int]:
    named = named_in_configs(token_configs(model), extent.of)
    return {*counted_from(model, extent), *(token for tokens in named.values() for token in tokens)}
