"""What a model costs: parameters, or multiply-adds of one example, from its anatomy; latency from a table handed in.

MACs of T tokens: every matrix with the head, plus 2·T·N·H a query token for attention scores and values (no causal
halving); look-ups, norms and softmax count 0; encoder-decoder: T tokens on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from ..model.anatomy import Anatomy
from ..plan import PruningPlan, SiteKey
from ..model.sites import Site


class SiteCost(Protocol):
    """Cost of one site with a number of query heads or neurons, and of KV heads."""

    def site(self, units: int, kv_heads: int) -> float: ...


@dataclass(frozen=True)
class UnitCost:
    """Cost of one query head or neuron, and of one KV head without its query heads."""

    unit: float
    kv: float

    def site(self, units: int, kv_heads: int) -> float:
        return units * self.unit + kv_heads * self.kv


@dataclass(frozen=True)
class CostModel:
    """The cost of every site and of what cannot be removed. Total = fixed + the sites."""

    metric: str
    fixed: float
    units: Mapping[SiteKey, SiteCost]

    def total(self, counts: Mapping[SiteKey, tuple[int, int]]) -> float:
        """Cost with (query heads or neurons, KV heads) per site."""
        return self.fixed + sum(self.units[key].site(*count) for key, count in counts.items())


def dense_counts(anatomy: Anatomy) -> dict[SiteKey, tuple[int, int]]:
    return {s.key: (s.heads, s.kv_heads) if s.is_attention else (s.columns, 0) for s in anatomy.sites}


def planned_counts(anatomy: Anatomy, plan: PruningPlan) -> dict[SiteKey, tuple[int, int]]:
    """Counts that a plan leaves, per site."""
    counts = {}
    for site in anatomy.sites:
        chosen = plan[site.key]
        share = site.heads // site.kv_heads if site.is_attention else 1
        if chosen.unit == "kv_group":
            counts[site.key] = (len(chosen.kept) * share, len(chosen.kept))
        elif chosen.unit == "head":
            counts[site.key] = (len(chosen.kept), len({head // share for head in chosen.kept}))
        else:
            counts[site.key] = (len(chosen.kept), 0)
    return counts


def params(anatomy: Anatomy, scope: str = "blocks") -> CostModel:
    """Parameters; scope "blocks" leaves embeddings and heads out."""
    units = {site.key: UnitCost(site.unit_params, site.kv_params) for site in anatomy.sites}
    total = anatomy.block_params if scope == "blocks" else anatomy.total_params
    return _with_fixed("params", anatomy, units, total)


def macs(anatomy: Anatomy, sequence_length: int, scope: str = "model") -> CostModel:
    """Multiply-adds of one example of `sequence_length` tokens (vision: of one image)."""
    tokens = anatomy.tokens(sequence_length)
    units = {site.key: _unit_macs(site, tokens) for site in anatomy.sites}
    fixed = anatomy.other_macs_token * tokens
    if scope == "model":
        fixed += anatomy.outside_macs_token * tokens + anatomy.outside_macs_example
    return CostModel("macs", fixed, units)


COSTS = {"macs": macs, "params": lambda anatomy, sequence_length, scope: params(anatomy, scope)}


def cost_model(
    anatomy: Anatomy, metric: str, sequence_length: int, scope: str, measured: CostModel | None = None
) -> CostModel:
    """The costs of a metric; those of "latency" are `measured` (see `hf_prune.decide.latency`) and only handed on."""
    if metric == "latency":
        if measured is None:
            raise ValueError("metric='latency' needs measured costs: hand in hf_prune.decide.latency.latency_table(...).")
        return measured
    return COSTS[metric](anatomy, sequence_length, scope)


def report(anatomy: Anatomy, counts: Mapping[SiteKey, tuple[int, int]], sequence_length: int) -> dict[str, float]:
    """MACs and parameters in both scopes."""
    return {
        f"{metric}_{scope}": cost_model(anatomy, metric, sequence_length, scope).total(counts)
        for metric in COSTS
        for scope in ("model", "blocks")
    }


def _unit_macs(site: Site, tokens: int) -> UnitCost:
    if not site.active:
        return UnitCost(0, 0)
    scores = 2 * tokens * tokens * site.head_dim if site.is_attention else 0
    return UnitCost(tokens * site.unit_weights + scores, tokens * site.kv_weights)


def _with_fixed(metric: str, anatomy: Anatomy, units: dict[SiteKey, UnitCost], total: float) -> CostModel:
    removable = CostModel(metric, 0, units).total(dense_counts(anatomy))
    return CostModel(metric, total - removable, units)
