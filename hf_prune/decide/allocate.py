"""Scores + costs + target -> plan. Pure: no model, and no weight is touched.

Every group of sites that must share a count offers options (count, loss, cost); a multiple-choice knapsack picks one
option a group: least summed loss at a cost within the budget. Stock and uniform shapes have a handful of groups, so
their answer is exact; per-layer shapes thin the frontier and stay within a fraction of a percent of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..model.anatomy import Anatomy
from ..config import PruningConfig, Shapes
from .costs import CostModel, cost_model, dense_counts, planned_counts
from .costs import report as cost_report
from ..plan import PruningPlan, SiteKey, SitePlan
from ..model.sites import Site

FRONTIER = 2048  # points kept of the cost-loss frontier while groups are merged
FAR_BELOW = 0.9  # of what was to remain: a plan that leaves less of it says so
NO_SAVING = 0.98  # of the latency: what measuring cannot tell from the dense model
SHAPES: tuple[Shapes, ...] = ("stock", "uniform", "per_layer")
Scores = Mapping[SiteKey, torch.Tensor]
Count = tuple[int, int]  # (KV groups or neurons, query heads a group or 1) in units of the scores


@dataclass(frozen=True)
class Ranking:
    """The units of one site (or of coupled sites) in order of importance."""

    unit: str
    scores: np.ndarray  # [G, R]: R units in each of G groups; neurons are groups of one
    counts: tuple[Count, ...]  # allowed
    gates: np.ndarray | None = None  # gate gradients of each example, [B, G*R]: what the units mean together

    def kept(self, count: Count) -> tuple[int, ...]:
        groups, each = count
        if self.gates is not None and self.scores.shape[1] == 1:
            return rearranged(self.gates, groups)
        best = np.sort(np.argsort(-self.scores, axis=1, kind="stable")[:, :each], axis=1)  # [G, each]
        value = np.take_along_axis(self.scores, best, axis=1).sum(1)
        rows = np.sort(np.argsort(-value, kind="stable")[:groups])
        return tuple(int(g) * self.scores.shape[1] + int(i) for g in rows for i in best[g])

    def losses(self) -> np.ndarray:
        """Summed score of what each allowed count removes."""
        within = -np.sort(-self.scores, axis=1)
        kept = {}
        for each in {each for _, each in self.counts}:
            value = -np.sort(-within[:, :each].sum(1))
            kept[each] = np.concatenate([[0.0], np.cumsum(value)])
        return np.array([self.scores.sum() - kept[each][groups] for groups, each in self.counts])


def rearranged(gates: np.ndarray, count: int) -> tuple[int, ...]:
    """The units kept when those removed are chosen together, by the block-diagonal Fisher.

    Start from the diagonal's choice and exchange each removed unit in turn for the one that makes E[(sum of the removed
    gates' gradients)²] least (Kwon et al. 2022, section 3.3, mask rearrangement).

    Args:
        gates: gate gradients, [B, U].
        count: units to keep.
    """
    order = np.argsort((gates**2).sum(0), kind="stable")
    removed = order[: gates.shape[1] - count].tolist()
    length, total = (gates**2).sum(0), gates[:, removed].sum(1)
    products = gates.T @ gates  # [U, U]
    along = gates.T @ total  # [U]: each unit with the sum of the removed ones
    is_removed = np.isin(np.arange(gates.shape[1]), removed)
    for unit in removed:
        along, is_removed[unit] = along - products[unit], False
        best = int(np.where(is_removed, np.inf, length + 2 * along).argmin())
        along, is_removed[best] = along + products[best], True
    return tuple(np.flatnonzero(~is_removed).tolist())


def choose_units(anatomy: Anatomy, config: PruningConfig) -> list[str]:
    """The units of a configuration, defaults filled in.

    Raises:
        ValueError: units that the stock class cannot express were asked for with stock shapes.
    """
    grouped = any(site.is_attention and site.kv_heads < site.heads for site in anatomy.sites)
    no_heads = config.shapes == "stock" and anatomy.family.stock_heads == "none"
    if config.units is None:
        return ["neurons"] if no_heads else ["neurons", "kv_groups" if grouped else "heads"]
    asked = [unit for unit in config.units if unit != "neurons"]
    if asked and no_heads:
        raise ValueError(
            f"units={config.units} with shapes='stock': a stock {anatomy.model_type} config cannot say another head "
            "count. Allowed in stock shapes: neurons. Use shapes='uniform' or 'per_layer' to remove heads."
        )
    return list(config.units)


def unit_of(site: Site, units: Sequence[str]) -> str:
    """The granularity at which a site is scored and planned."""
    if not site.is_attention:
        return "neuron"
    return "kv_group" if "kv_groups" in units and "heads" not in units else "head"


def default_align(anatomy: Anatomy, device: str) -> int:
    """32 on CPU, 64 on GPU, halved while an FFN would offer fewer than 16 widths."""
    align = 64 if device == "cuda" else 32
    narrowest = min((site.columns for site in anatomy.sites if not site.is_attention), default=align)
    while align > 1 and narrowest // align < 16:
        align //= 2
    return align


def allocate(
    anatomy: Anatomy,
    scores: Scores,
    config: PruningConfig,
    align: int,
    across: str = "as they are",
    gates: Scores | None = None,
    measured: CostModel | None = None,
) -> PruningPlan:
    """The plan that loses least score at `config.keep` of the cost.

    Args:
        scores: importance per unit, a tensor [U] per site, at the granularity of `unit_of`.
        align: kept FFN widths are multiples of it.
        across: how scores of different sites are made comparable, see `importance.Criterion`.
        gates: gate gradients of each example [B, U] per site: the removed units are then chosen together.
        measured: the costs of metric "latency".

    Raises:
        ValueError: `keep` is below what the units and shapes can reach; the message gives the reachable minimum.
    """
    costs = cost_model(anatomy, config.metric, config.sequence_length, config.scope or "model", measured)
    dense = costs.total(dense_counts(anatomy))
    if config.keep == 1:  # all stays, also what scores nothing
        return _plan(anatomy, [_everything(site, config) for site in anatomy.sites], config, costs, loss=0.0)
    sizes = {key: costs.units[key].site(*count) for key, count in dense_counts(anatomy).items()}
    comparable = _comparable(scores, across, sizes)
    groups, rankings, tables = _offers(anatomy, comparable, config, align, costs, gates or {})
    chosen = _knapsack(tables, config.keep * dense - costs.fixed)
    if chosen is None:
        raise ValueError(_unreachable(anatomy, config, align, dense, measured))
    counts = {
        site.key: rankings[site.key].counts[option]
        for members, option in zip(groups, chosen, strict=True)
        for site in members
    }
    sites = [_site_plan(site, rankings[site.key], counts[site.key]) for site in anatomy.sites]
    loss = sum(float(table.loss[option]) for table, option in zip(tables, chosen, strict=True))
    return _plan(anatomy, sites, config, costs, loss)


def warn_if_far_below(kept: float, config: PruningConfig) -> None:
    """Warn where less than `FAR_BELOW` of what was to remain does: a large step may lose less score than small ones."""
    if kept >= FAR_BELOW * config.keep:
        return
    warnings.warn(
        f"{kept:.3g} of the {config.metric} ({config.scope}) remains, where keep={config.keep:.3g} was asked for: of "
        f"what units={config.units or 'None'} and shapes={config.shapes!r} allow, this loses the least score. Finer "
        "steps: shapes='per_layer', a smaller align, or units=['neurons'].",
        stacklevel=3,
    )


def reachable(anatomy: Anatomy, config: PruningConfig, align: int, measured: CostModel | None = None) -> float:
    """The least fraction of the cost that can remain with these units and shapes."""
    costs = cost_model(anatomy, config.metric, config.sequence_length, config.scope or "model", measured)
    units = choose_units(anatomy, config)
    flat = {site.key: np.ones(site.sizes[unit_of(site, units)]) for site in anatomy.sites}
    _, _, tables = _offers(anatomy, flat, config, align, costs)
    least = costs.fixed + sum(table.cost.min() for table in tables)
    return float(least / costs.total(dense_counts(anatomy)))


def _comparable(scores: Scores, across: str, sizes: Mapping[SiteKey, float]) -> dict[SiteKey, np.ndarray]:
    """Scores of all sites on one scale; `sizes` are what the whole sites cost."""
    values = {key: score.double().numpy() for key, score in scores.items()}
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
    scores: Mapping[SiteKey, np.ndarray],
    config: PruningConfig,
    align: int,
    costs: CostModel,
    gates: Scores | None = None,
) -> tuple[list[list[Site]], dict[SiteKey, Ranking], list[Table]]:
    """Groups of sites that must share a count, each site's ranking, and what each count of a group loses and costs."""
    groups = _groups(anatomy, config.shapes)
    units = choose_units(anatomy, config)
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
    return groups, rankings, [_alike(table) for table in tables] if config.allocation == "ratio" else tables


def _ranking(
    site: Site, scores: np.ndarray, units: Sequence[str], anatomy: Anatomy, shapes: str, align: int
) -> Ranking:
    unit = unit_of(site, units)
    groups = site.kv_heads if site.is_attention else site.columns
    each = len(scores) // groups
    if unit == "neuron":
        widths = [*range(align, groups, align), groups] if "neurons" in units else [groups]
        return Ranking(unit, scores.reshape(groups, 1), tuple((width, 1) for width in widths))
    groups_free = "kv_groups" in units or ("heads" in units and each == 1)
    counts = [
        (g, r)
        for g in (range(1, groups + 1) if groups_free else [groups])
        for r in (range(1, each + 1) if "heads" in units else [each])
    ]
    if shapes == "stock" and anatomy.family.stock_heads == "divisors":
        heads = site.heads // len(scores)
        counts = [(g, r) for g, r in counts if anatomy.hidden_size % (g * r * heads) == 0] or [(groups, each)]
    return Ranking(unit, scores.reshape(groups, each), tuple(counts))


def _coupled(anatomy: Anatomy) -> list[list[Site]]:
    """Sites that must keep the same indices."""
    return _grouped(anatomy, lambda site: (site.stack, site.kind) if _is_coupled(anatomy, site) else site.key)


def _is_coupled(anatomy: Anatomy, site: Site) -> bool:
    return anatomy.family.coupled_heads and site.is_attention


def _groups(anatomy: Anatomy, shapes: str) -> list[list[Site]]:
    """Sites that must share a count: all under one config key, or, per layer, only the coupled ones."""
    if shapes == "per_layer":
        return _coupled(anatomy)
    return _grouped(anatomy, lambda site: site.row.count_key)


def _grouped(anatomy: Anatomy, key: Callable[[Site], object]) -> list[list[Site]]:
    groups: dict[object, list[Site]] = {}
    for site in anatomy.sites:
        groups.setdefault(key(site), []).append(site)
    return list(groups.values())


def _with_common_counts(groups: list[list[Site]], rankings: dict[SiteKey, Ranking]) -> dict[SiteKey, Ranking]:
    """Rankings that offer what every site of their group can have, in the same order.

    Heads and KV heads are compared, not units: after an earlier cut a KV group may be one query head here, two there.
    """
    found: dict[SiteKey, Ranking] = {}
    for members in groups:
        offers = [{_absolute(site, rankings[site.key], c): c for c in rankings[site.key].counts} for site in members]
        common = [count for count in offers[0] if all(count in offer for offer in offers)]
        if not common:
            raise ValueError(
                f"{members[0].name} and the {len(members) - 1} sites that must match it differ already and share no "
                "allowed count. Use shapes='per_layer', or a smaller align."
            )
        narrowed = {
            id(rankings[site.key]): replace(rankings[site.key], counts=tuple(offer[count] for count in common))
            for site, offer in zip(members, offers, strict=True)
        }
        found.update({site.key: narrowed[id(rankings[site.key])] for site in members})
    return found


@dataclass(frozen=True)
class Table:
    """Loss and cost of each allowed count of a group."""

    loss: np.ndarray
    cost: np.ndarray


def _table(members: Sequence[Site], rankings: Mapping[SiteKey, Ranking], costs: CostModel) -> Table:
    # coupled sites share a ranking whose scores are already summed
    distinct = {id(rankings[site.key]): rankings[site.key] for site in members}
    loss = sum(ranking.losses() for ranking in distinct.values())
    cost = sum(_costs(site, rankings[site.key], costs) for site in members)
    return Table(np.asarray(loss), np.asarray(cost))


def _alike(table: Table) -> Table:
    """The table whose least loss takes the same fraction from every group: cost · (fraction removed)².

    At a given total cost the sum of c·f² over groups of cost c is least where every fraction f is the same.
    """
    dense = table.cost.max()
    return replace(table, loss=(dense - table.cost) ** 2 / max(dense, 1e-30))


def _costs(site: Site, ranking: Ranking, costs: CostModel) -> np.ndarray:
    return np.array([costs.units[site.key].site(*_absolute(site, ranking, count)) for count in ranking.counts])


def _absolute(site: Site, ranking: Ranking, count: Count) -> tuple[int, int]:
    """A count as (query heads or neurons, KV heads)."""
    groups, each = count
    if not site.is_attention:
        return groups, 0
    return groups * each * (site.heads // ranking.scores.size), groups


def _knapsack(tables: Sequence[Table], budget: float) -> list[int] | None:
    """One option per table: least total loss with total cost <= budget. None if no choice is within it."""
    budget = budget * (1 + 1e-12)
    reserve = np.cumsum([0.0, *[table.cost.min() for table in reversed(tables)]])[::-1][1:]  # what later tables need
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for table, later in zip(tables, reserve, strict=True):
        all_cost = (cost[:, None] + table.cost).ravel()
        all_loss = (loss[:, None] + table.loss).ravel()
        order = np.flatnonzero(all_cost + later <= budget)
        if not len(order):
            return None
        order = order[np.lexsort((all_loss[order], all_cost[order]))]
        best = np.minimum.accumulate(all_loss[order])
        order = order[np.flatnonzero(np.concatenate([[True], best[1:] < best[:-1]]))]  # the Pareto frontier
        order = _thin(order, all_cost)
        steps.append((order // len(table.cost), order % len(table.cost)))
        cost, loss = all_cost[order], all_loss[order]
    return _trace(steps, int(loss.argmin()))


def _thin(order: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """At most `FRONTIER` points of a frontier sorted by cost: the dearest (so the best) of each cost bin."""
    if len(order) <= FRONTIER:
        return order
    edges = np.linspace(cost[order[0]], cost[order[-1]], FRONTIER)
    return order[np.unique(np.searchsorted(cost[order], edges, side="right") - 1)]


def _trace(steps: list[tuple[np.ndarray, np.ndarray]], point: int) -> list[int]:
    chosen = []
    for previous, option in reversed(steps):
        chosen.append(int(option[point]))
        point = int(previous[point])
    return chosen[::-1]


def _site_plan(site: Site, ranking: Ranking, count: Count) -> SitePlan:
    return SitePlan(site.stack, site.layer, site.kind, ranking.unit, ranking.scores.size, ranking.kept(count))


def _everything(site: Site, config: PruningConfig) -> SitePlan:
    unit = unit_of(site, config.units or ())
    count = site.sizes[unit]
    return SitePlan(site.stack, site.layer, site.kind, unit, count, tuple(range(count)))


def _plan(
    anatomy: Anatomy, sites: Sequence[SitePlan], config: PruningConfig, costs: CostModel, loss: float
) -> PruningPlan:
    plan = PruningPlan(anatomy.model_type, tuple(sites), config=config.to_dict())
    counts, dense = planned_counts(anatomy, plan), dense_counts(anatomy)
    cost = {
        "metric": config.metric,
        "scope": config.scope,
        "sequence_length": anatomy.tokens(config.sequence_length),
        "keep": costs.total(counts) / costs.total(dense),
        "predicted_loss": loss,
        "before": cost_report(anatomy, dense, config.sequence_length),
        "after": cost_report(anatomy, counts, config.sequence_length),
    }
    if config.metric == "latency":
        cost |= {"dense_ms": costs.total(dense), "predicted_ms": costs.total(counts)}
    return replace(plan, cost=cost)


def _unreachable(anatomy: Anatomy, config: PruningConfig, align: int, dense: float, measured: CostModel | None) -> str:
    def least(shapes: Shapes) -> str:
        units = config.units if shapes == config.shapes else None
        return f"{reachable(anatomy, replace(config, shapes=shapes, units=units), align, measured):.3f}"

    others = ", ".join(f"shapes={shapes!r} {least(shapes)}" for shapes in SHAPES if shapes != config.shapes)
    unit = " ms" if measured else ""
    text = (
        f"keep={config.keep} of the {config.metric} ({config.scope}, dense {dense:.4g}{unit}) cannot be reached with "
        f"units={choose_units(anatomy, config)} and shapes={config.shapes!r}: the least is {least(config.shapes)}. "
        f"The other shapes reach, with all their units: {others}."
    )
    if measured and reachable(anatomy, config, align, measured) > NO_SAVING:
        text += " No count saves time worth the name here; a larger latency_batch_size or sequence_length may."
    door = anatomy.family.as_model_type
    if config.shapes == "stock" and door:
        text += f" Or prune with shapes='uniform' and save with save_pretrained(..., model_type={door!r})."
    return text
