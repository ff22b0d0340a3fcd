"""Scores + costs + target -> plan. Pure: no model, and no weight is touched.

Every group of sites that must share a count offers options (count, loss, cost), of which a knapsack picks one a group.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..config import PruningConfig, Shapes
from ..model.anatomy import Anatomy
from ..model.axes import Axis
from ..model.sites import Counts, Site
from ..plan import Kept, PruningPlan, Where
from .costs import CostModel, cost_model, planned_sizes
from .costs import report as cost_report
from .knapsack import Table, alike, chains, chosen_of
from .ranking import Count, Ranking
from .units import asked, choose_units, unit_of

FAR_BELOW = 0.9  # of what was to remain: a plan that leaves less of it says so
NO_SAVING = 0.98  # of the latency: what measuring cannot tell from the dense model
SHAPES: tuple[Shapes, ...] = ("stock", "uniform", "per_layer")
Scores = Mapping[Where, torch.Tensor]


def allocate(
    anatomy: Anatomy,
    scores: Scores,
    config: PruningConfig,
    align: int,
    across: str = "as they are",
    gates: Scores | None = None,
    measured: CostModel | None = None,
    wide: Sequence[Kept] = (),
) -> PruningPlan:
    """The plan that loses least score at `config.keep` of the cost.

    Args:
        scores: importance per unit, a tensor [U] per site, at the granularity of `unit_of`.
        align: counts of aligned axes are multiples of it.
        across: how scores of different sites are made comparable, see `criteria.Criterion`.
        gates: gate gradients of each example [B, U] per site: the removed units are then chosen together.
        measured: the costs of metric "latency".
        wide: the layers, tokens and hidden channels that stay, decided before; by default all.

    Raises:
        ValueError: `keep` is below what the units and shapes can reach; the message gives the reachable minimum.
    """
    dense = _costs_of(anatomy, config, measured).total(anatomy.sizes)
    here = within(anatomy, wide)
    costs = _costs_of(_narrowed(anatomy, wide), config, measured)
    if config.keep == 1 and not wide:  # all stays, also what scores nothing
        return _plan(anatomy, [everything(site, config) for site in anatomy.sites], config, costs, dense, loss=0.0)
    comparable = _comparable(scores, across, {s.key: costs.units[s.key].site(s.sizes) for s in anatomy.sites})
    groups, rankings, tables = _offers(here, comparable, config, align, costs, gates or {})
    budget = config.keep * dense - costs.wide(here.sizes)
    chosen = chosen_of(chains(tables, _twice(groups, rankings, costs)), budget)
    if chosen is None:
        raise ValueError(_unreachable(anatomy, config, align, dense, measured, wide))
    counts = {
        site.key: rankings[site.key].counts[option]
        for members, option in zip(groups, chosen, strict=True)
        for site in members
    }
    kept = [_kept(site, rankings[site.key], counts[site.key]) for site in here.sites]
    loss = sum(float(table.loss[option]) for table, option in zip(tables, chosen, strict=True))
    return _plan(anatomy, [*wide, *kept], config, costs, dense, loss)


def _costs_of(anatomy: Anatomy, config: PruningConfig, measured: CostModel | None) -> CostModel:
    return cost_model(anatomy, config.metric, config.sequence_length, config.scope or "model", measured)


def _narrowed(anatomy: Anatomy, wide: Sequence[Kept]) -> Anatomy:
    return anatomy.narrowed({kept.where: {kept.axis: len(kept.kept)} for kept in wide})


def within(anatomy: Anatomy, wide: Sequence[Kept]) -> Anatomy:
    """The anatomy of what these layers, tokens and channels leave; sites keep the numbers of their layers."""
    left, anatomy = {kept.where: kept for kept in wide}, _narrowed(anatomy, wide)
    sites = tuple(s for s in anatomy.sites if (s.stack,) not in left or s.layer in left[s.stack,].kept)
    extents = (replace(e, of=len(left[e.where].kept)) if e.where in left else e for e in anatomy.extents)
    layers = {w: p for w, p in anatomy.layer_params.items() if w[:1] not in left or w[1] in left[w[:1]].kept}
    return replace(anatomy, sites=sites, extents=tuple(extents), layer_params=layers)


def warn_if_far_below(kept: float, config: PruningConfig) -> None:
    """Warn where less than `FAR_BELOW` of what was to remain does: a large step may lose less score than small ones.

    Not of a vocabulary: tokens that are never used go whatever the target is.
    """
    if kept >= FAR_BELOW * config.keep or "tokens" in (config.units or ()):
        return
    by_width = "hidden" in (config.units or ())
    finer = "add neurons to the units" if by_width else "shapes='per_layer', a smaller align, or units=['neurons']"
    warnings.warn(
        f"{kept:.3g} of the {config.metric} ({config.scope}) remains, where keep={config.keep:.3g} was asked for: of "
        f"what units={config.units or 'None'} and shapes={config.shapes!r} allow, this loses the least score. Finer "
        f"steps: {finer}.",
        stacklevel=3,
    )


def reachable(
    anatomy: Anatomy,
    config: PruningConfig,
    align: int,
    measured: CostModel | None = None,
    wide: Sequence[Kept] = (),
) -> float:
    """The least fraction of the cost that can remain with these units and shapes, and these layers and tokens."""
    costs = _costs_of(_narrowed(anatomy, wide), config, measured)
    units = choose_units(anatomy, config)
    here = within(anatomy, wide)
    flat = {site.key: np.ones(site.sizes[unit_of(site, units)]) for site in here.sites}
    groups, rankings, tables = _offers(here, flat, config, align, costs)
    joined = chains(tables, _twice(groups, rankings, costs))
    least = costs.wide(here.sizes) + sum(chain.table.cost.min() for chain in joined)
    return float(least / _costs_of(anatomy, config, measured).total(anatomy.sizes))


def _comparable(scores: Scores, across: str, sizes: Mapping[Where, float]) -> dict[Where, np.ndarray]:
    """Scores of all sites on one scale; `sizes` are what the whole sites cost."""
    values = {key: score.double().numpy() for key, score in scores.items() if key in sizes}
    if across == "sum":
        values = {key: value / max(value.sum(), 1e-30) for key, value in values.items()}
    elif across == "standard":
        values = {key: (value - value.mean()) / max(value.std(), 1e-30) for key, value in values.items()}
        least = min(value.min() for value in values.values())
        # the lowest go first whatever they cost: a unit is worth its height above the lowest, times its cost
        values = {key: (value - least) * sizes[key] / len(value) for key, value in values.items()}
    return values


def _offers(
    anatomy: Anatomy,
    scores: Mapping[Where, np.ndarray],
    config: PruningConfig,
    align: int,
    costs: CostModel,
    gates: Scores | None = None,
) -> tuple[list[list[Site]], dict[Where, Ranking], list[Table]]:
    """Groups of sites that must share a count, each site's ranking, and what each count of a group loses and costs."""
    units = choose_units(anatomy, config)
    groups = _groups(anatomy, config.shapes, units)
    rankings = {}
    for coupled in _coupled(anatomy):
        total = np.asarray(sum(scores[site.key] for site in coupled))
        ranking = _ranking(coupled[0], total, units, anatomy, config.shapes, align)
        if gates:
            together = np.concatenate([gates[site.key].double().numpy() for site in coupled])
            ranking = replace(ranking, gates=together)
        rankings.update({site.key: ranking for site in coupled})
    rankings = _with_common_counts(groups, rankings)
    tables = [_table(members, rankings, costs) for members in groups]
    return groups, rankings, [alike(table) for table in tables] if config.allocation == "ratio" else tables


def _ranking(
    site: Site, scores: np.ndarray, units: Sequence[str], anatomy: Anatomy, shapes: str, align: int
) -> Ranking:
    unit = unit_of(site, units)
    of, split = site.sizes[site.outer.name], unit == site.outer.name and site.split > 1
    groups = site.split if split else of
    each = len(scores) // groups
    free = [axis for axis in site.row.axes if asked(axis, units) and not (shapes == "stock" and axis.stock == "none")]
    outer = _allowed(site.outer, each if split else of, align, site.routed) if site.outer in free else []
    inner = _allowed(site.inner, each, align) if site.inner in free and each > 1 else [each]
    if split:
        counts = [(groups, r) for r in outer or [each]]
    elif each == 1 and free:
        counts = [(g, 1) for g in outer or _allowed(site.inner, groups, align, multiple=site.multiple)]
    else:
        counts = [(g, r) for g in outer or [groups] for r in inner]
    of_each = site.sizes[site.inner.name] // len(scores)
    if shapes == "stock" and site.inner.stock == "none" and site.inner.mixes:  # as the width of the stream says
        said = [(g, each) for g in range(1, groups) if site.fits(site.counts(g, each * of_each), site.hidden)]
        counts = said or counts
    if shapes == "stock" and site.inner.stock == "divisors":
        counts = [(g, r) for g, r in counts if site.hidden % (g * r * of_each) == 0] or [(groups, each)]
    return Ranking(unit, scores.reshape(groups, each), tuple(counts))


def _allowed(axis: Axis, of: int, align: int, least: int = 1, multiple: int = 1) -> list[int]:
    """The counts that an axis of so many units may take, where the config counts every `multiple`-th."""
    step = math.lcm(align if axis.aligned else 1, axis.step) * multiple
    return [count for count in (*range(step, of, step), of) if count >= least]


def _coupled(anatomy: Anatomy) -> list[list[Site]]:
    """Sites that must keep the same indices."""
    return _grouped(anatomy, lambda site: (site.stack, site.kind) if site.inner.tied else site.key)


def _groups(anatomy: Anatomy, shapes: str, units: Sequence[str]) -> list[list[Site]]:
    """Sites that must share a count: all under one config key, or, per layer, those of a layer. Where no units of sites
    are asked for, all stay as they are, also where layers differ already.

    Encoder-decoder models have a form of their own that tells the sites of a layer apart; not so a lone decoder, whose
    cross-attention never runs. In a stem every site has its own key.
    """
    if shapes != "per_layer":
        some = any(asked(axis, units) for site in anatomy.sites for axis in site.row.axes)
        return _grouped(anatomy, lambda site: site.inner.config if some else site.key)
    if len({site.stack for site in anatomy.sites if not site.is_stem}) > 1:
        crossing = {s.path for s in anatomy.sites if s.elsewhere and not s.is_stem}  # what they cost is a product
        return _grouped(
            anatomy,
            lambda s: (s.stack, s.kind) if s.inner.tied else (s.stack, s.layer) if s.path in crossing else s.key,
        )
    return _grouped(anatomy, lambda site: (site.stack, site.kind if site.inner.tied else site.layer, site.inner.config))


def _grouped(anatomy: Anatomy, key: Callable[[Site], object]) -> list[list[Site]]:
    groups: dict[object, list[Site]] = {}
    for site in anatomy.sites:
        groups.setdefault(key(site), []).append(site)
    return list(groups.values())


def _with_common_counts(groups: list[list[Site]], rankings: dict[Where, Ranking]) -> dict[Where, Ranking]:
    """Rankings that offer what every site of their group can have, in the same order.

    Sizes are compared, not counts of units: after an earlier cut a KV group may be one query head here, two there.
    """
    found: dict[Where, Ranking] = {}
    for members in groups:
        offers = [
            {_said(site.said(_sizes(site, rankings[site.key], c)), site): c for c in rankings[site.key].counts}
            for site in members
        ]
        most = max(range(len(members)), key=lambda i: len(members[i].values))  # experts say more than what is beside
        every = [dict(said) for said in offers[most]]
        common = [
            values for values in every if all(_said(values, s) in o for s, o in zip(members, offers, strict=True))
        ]
        if not common:
            raise ValueError(
                f"{members[0].name} and the {len(members) - 1} sites that must match it differ already and share no "
                "allowed count. Use shapes='per_layer', or a smaller align."
            )
        narrowed = {
            id(rankings[site.key]): replace(
                rankings[site.key], counts=tuple(offer[_said(values, site)] for values in common)
            )
            for site, offer in zip(members, offers, strict=True)
        }
        found.update({site.key: narrowed[id(rankings[site.key])] for site in members})
    return found


def _table(members: Sequence[Site], rankings: Mapping[Where, Ranking], costs: CostModel) -> Table:
    # coupled sites share a ranking whose scores are already summed
    distinct = {id(rankings[site.key]): rankings[site.key] for site in members}
    loss = sum(ranking.losses() for ranking in distinct.values())
    cost = sum(_costs(site, rankings[site.key], costs) for site in members)
    return Table(np.asarray(loss), np.asarray(cost - _spared(members, rankings, costs)))


def _spared(members: Sequence[Site], rankings: Mapping[Where, Ranking], costs: CostModel) -> np.ndarray:
    """What the members count twice, at each count that they share."""
    options = range(len(rankings[members[0].key].counts))
    chosen = [{s.key: _sizes(s, rankings[s.key], rankings[s.key].counts[i]) for s in members} for i in options]
    return np.array([costs.spared(sizes) for sizes in chosen])


def _twice(
    groups: Sequence[Sequence[Site]], rankings: Mapping[Where, Ranking], costs: CostModel
) -> dict[int, np.ndarray]:
    """What a group and the next one count both, of every option beside every option of the next: matrices between two
    sites of a stem, by the number of the first group."""
    group = {site.key: number for number, members in enumerate(groups) for site in members}
    found = {}
    for crossing in costs.crossings:
        first, second = crossing.first.key, crossing.second.key
        if {first, second} <= group.keys() and group[first] != group[second]:
            ours, theirs = ([_sizes(s, rankings[s.key], c) for c in rankings[s.key].counts] for s in crossing.pair)
            found[group[first]] = np.array([[crossing.spared(a, b) for b in theirs] for a in ours])
    return found


def _costs(site: Site, ranking: Ranking, costs: CostModel) -> np.ndarray:
    return np.array([costs.units[site.key].site(_sizes(site, ranking, count)) for count in ranking.counts])


def _sizes(site: Site, ranking: Ranking, count: Count) -> Counts:
    units = math.prod(count)
    if ranking.axis == site.outer.name:
        return site.counts(units, site.share)
    return site.counts(count[0], units // count[0])


def _said(values: Mapping[str, int], site: Site) -> Where:
    """Of config values those that size a site."""
    return tuple((key, values[key]) for key in site.values)


def _kept(site: Site, ranking: Ranking, count: Count) -> Kept:
    return Kept(site.key, ranking.axis, ranking.scores.size, ranking.kept(count))


def everything(site: Site, config: PruningConfig) -> Kept:
    """All units of a site."""
    axis = unit_of(site, config.units or ())
    return Kept(site.key, axis, site.sizes[axis], tuple(range(site.sizes[axis])))


def _plan(
    anatomy: Anatomy, kept: Sequence[Kept], config: PruningConfig, costs: CostModel, dense: float, loss: float
) -> PruningPlan:
    plan = PruningPlan(anatomy.model_type, tuple(kept), config=config.to_dict())
    sizes = planned_sizes(anatomy, plan)
    cost = {
        "metric": config.metric,
        "scope": config.scope,
        "sequence_length": anatomy.tokens(config.sequence_length),
        "keep": costs.total(sizes) / dense,
        "predicted_loss": loss,
        "before": cost_report(anatomy, anatomy.sizes, config.sequence_length),
        "after": cost_report(anatomy, sizes, config.sequence_length),
    }
    if config.metric == "latency":
        cost |= {"dense_ms": dense, "predicted_ms": costs.total(sizes)}
    return replace(plan, cost=cost)


def _unreachable(
    anatomy: Anatomy,
    config: PruningConfig,
    align: int,
    dense: float,
    measured: CostModel | None,
    wide: Sequence[Kept],
) -> str:
    def least(shapes: Shapes) -> str:
        same = shapes == config.shapes
        others = replace(config, shapes=shapes, units=config.units if same else None)
        stays = [kept for kept in wide if same or kept.axis != "hidden"]
        return f"{reachable(anatomy, others, align, measured, stays):.3f}"

    other = [shapes for shapes in SHAPES if shapes != config.shapes and shapes in anatomy.family.shapes]
    others = ", ".join(f"shapes={shapes!r} {least(shapes)}" for shapes in other)
    unit = " ms" if measured else ""
    text = (
        f"keep={config.keep} of the {config.metric} ({config.scope}, dense {dense:.4g}{unit}) cannot be reached with "
        f"units={choose_units(anatomy, config)} and shapes={config.shapes!r}: the least is {least(config.shapes)}"
        f"{''.join(f', with {len(k.kept):,} of {k.of:,} {k.axis}' for k in wide)}. "
        + (f"The other shapes reach, with all their units: {others}." if others else "Remove layers or tokens as well.")
    )
    if measured and reachable(anatomy, config, align, measured, wide) > NO_SAVING:
        text += " No count saves time worth the name here; a larger latency_batch_size or sequence_length may."
    door = anatomy.family.as_model_type
    if config.shapes == "stock" and door:
        text += f" Or prune with shapes='uniform' and save with save_pretrained(..., model_type={door!r})."
    return text
