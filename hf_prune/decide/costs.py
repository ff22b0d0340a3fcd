"""What a model costs: parameters, bytes, or multiply-adds of one example, from its anatomy; latency from a table.

MACs of T tokens: every matrix with the head, plus 2·T·N·H a query token for attention scores and values (no causal
halving); look-ups, norms and softmax count 0; encoder-decoder: T tokens on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..model.anatomy import Anatomy
from ..model.sites import Counts, Site
from ..plan import PruningPlan, Where

Sizes = Mapping[Where, Counts]  # place -> axis -> units, as in `Anatomy.sizes`; layers that are missing are gone


class SiteCost(Protocol):
    """Cost of one site with so many units of its axes."""

    def site(self, counts: Counts) -> float: ...


@dataclass(frozen=True)
class Product:
    """Elements of the tensors of a site, each a product over its dimensions; and what is compared, for each pair."""

    of: Site
    factor: float
    matrices: bool
    pairs: float = 0.0

    def site(self, counts: Counts) -> float:
        return self.factor * self.of.elements(counts, self.matrices) + self.pairs * self.of.compared(counts)

    def matrix(self, tensor: str) -> float:
        """The cost of a matrix of the site by itself."""
        times = self.of.applied.get(tensor, 1) if self.matrices else 1
        return self.factor * math.prod(self.of.shapes[tensor]) * times


@dataclass(frozen=True)
class Crossing:
    """A matrix between the units of two sites, which costs the product of what remains of them; the first site counts
    it with all units of the second."""

    first: Site
    second: Site
    cost: float

    @property
    def pair(self) -> tuple[Site, Site]:
        return self.first, self.second

    def spared(self, first: Counts, second: Counts) -> float:
        """What the first site counts too much."""
        left, right = (
            counts[site.inner.name] / site.sizes[site.inner.name]
            for site, counts in zip(self.pair, (first, second), strict=True)
        )
        return self.cost * left * (1 - right)


@dataclass(frozen=True)
class CostModel:
    """The cost of every site, of the rest of every layer, of a token of the vocabulary, and of what always stays."""

    metric: str
    fixed: float
    units: Mapping[Where, SiteCost]
    layers: Mapping[Where, float] = field(default_factory=dict)  # (stack, layer) -> beside its sites
    token: float = 0.0
    crossings: tuple[Crossing, ...] = ()

    def total(self, sizes: Sizes) -> float:
        sites = {key: counts for key, counts in sizes.items() if len(key) == 3}
        return (
            self.wide(sizes) + sum(self.units[key].site(counts) for key, counts in sites.items()) - self.spared(sites)
        )

    def spared(self, sites: Sizes) -> float:
        """What these sites, each for itself, count too much."""
        both = [c for c in self.crossings if c.first.key in sites and c.second.key in sites]
        return sum(c.spared(sites[c.first.key], sites[c.second.key]) for c in both)

    def wide(self, sizes: Sizes) -> float:
        """The cost of all but the sites."""
        rest = sum(self.layers.get(key, 0.0) for key in sizes if len(key) == 2)
        return self.fixed + rest + self.token * sizes.get((), {}).get("tokens", 0)


def planned_sizes(anatomy: Anatomy, plan: PruningPlan) -> Sizes:
    """Units that a plan leaves, by place."""
    sizes: dict[Where, Counts] = {e.where: {e.axis.name: e.of} for e in anatomy.extents}
    sizes |= {k.where: {k.axis: len(k.kept)} for k in plan.kept if len(k.where) < 3}
    sizes |= {layer: {} for layer in anatomy.layer_params if plan.has_layer(*layer)}
    for site in anatomy.sites:
        chosen = plan.get(site.key)
        if chosen is not None:
            sizes[site.key] = {a: len(units) for a, units in site.expand(chosen.axis, chosen.kept).items()}
        elif not plan.names(site.key):
            sizes[site.key] = site.sizes
    return sizes


def params(anatomy: Anatomy, sequence_length: int = 0, scope: str = "blocks") -> CostModel:
    """Parameters; scope "blocks" leaves embeddings, stems and heads out."""
    whole = scope == "model"
    units = _products(anatomy, 1.0, whole)
    costs = CostModel("params", 0, units, token=anatomy.token_params * whole, crossings=crossings(anatomy, units))
    return _with_fixed(anatomy, anatomy.total_params if whole else anatomy.block_params, costs)


def file_bytes(anatomy: Anatomy, sequence_length: int = 0, scope: str = "model") -> CostModel:
    """Bytes of the saved weights in their dtype."""
    size = anatomy.total_bytes / anatomy.total_params
    token, units = size * anatomy.token_params, _products(anatomy, size, True)
    whole = CostModel("bytes", 0, units, token=token, crossings=crossings(anatomy, units))
    return _with_fixed(anatomy, anatomy.total_bytes, whole, size)


def macs(anatomy: Anatomy, sequence_length: int, scope: str = "model") -> CostModel:
    """Multiply-adds of one example of `sequence_length` tokens (vision: of one image)."""
    tokens, whole = anatomy.tokens(sequence_length), scope == "model"
    stacks = {*(stack for stack, _ in anatomy.layer_weights), *(site.stack for site in anatomy.sites)}
    of = {stack: anatomy.tokens(sequence_length, stack) for stack in stacks}
    units = {
        site.key: Product(site, of[site.stack], matrices=True, pairs=of[site.stack] ** 2)
        if site.active and (whole or not site.is_stem)
        else Product(site, 0, True)
        for site in anatomy.sites
    }
    layers = {key: elements * of[key[0]] for key, elements in anatomy.layer_weights.items()}
    head = anatomy.token_weights * tokens
    outside = anatomy.outside_macs_token * tokens + anatomy.outside_macs_example
    everything = anatomy.sizes.get((), {}).get("tokens", 0)
    fixed = outside - head * everything if whole else 0
    return CostModel("macs", fixed, units, layers, head if whole else 0, crossings(anatomy, units))


COSTS: Mapping[str, Callable[[Anatomy, int, str], CostModel]] = {"macs": macs, "params": params, "bytes": file_bytes}


def cost_model(
    anatomy: Anatomy, metric: str, sequence_length: int, scope: str, measured: CostModel | None = None
) -> CostModel:
    """The costs of a metric; those of "latency" are `measured` (see `decide.latency`) and only handed on."""
    if metric == "latency":
        if measured is None:
            raise ValueError("metric='latency' needs measured costs: hand in decide.latency.latency_table(...).")
        return measured
    return COSTS[metric](anatomy, sequence_length, scope)


def report(anatomy: Anatomy, sizes: Sizes, sequence_length: int) -> dict[str, float]:
    """MACs and parameters in both scopes."""
    anatomy = anatomy.narrowed(sizes)
    return {
        f"{metric}_{scope}": cost_model(anatomy, metric, sequence_length, scope).total(sizes)
        for metric in ("macs", "params")
        for scope in ("model", "blocks")
    }


def _products(anatomy: Anatomy, factor: float, whole: bool) -> dict[Where, Product]:
    """The sizes of the sites. `whole`: also of a stem, which is among no blocks."""
    return {s.key: Product(s, factor if whole or not s.is_stem else 0.0, matrices=False) for s in anatomy.sites}


def crossings(anatomy: Anatomy, units: Mapping[Where, Product]) -> tuple[Crossing, ...]:
    """The matrices between two sites of a layer, which both are sized by."""
    found = []
    for second in (site for site in anatomy.sites if site.elsewhere):
        for first in (site for site in anatomy.sites if site.path == second.path and site.key != second.key):
            for tensor in second.elsewhere & first.shapes.keys():
                found.append(Crossing(first, second, units[first.key].matrix(tensor)))
    return tuple(found)


def _with_fixed(anatomy: Anatomy, total: float, costs: CostModel, factor: float = 1.0) -> CostModel:
    """Costs whose layers and fixed part make up what is known in all."""
    layers = {key: factor * params for key, params in anatomy.layer_params.items()}
    for site in (site for site in anatomy.sites if not site.is_stem):
        layers[site.key[:2]] -= costs.units[site.key].site(site.sizes)
    partial = replace(costs, layers=layers)
    return replace(partial, fixed=total - partial.total(anatomy.sizes))
