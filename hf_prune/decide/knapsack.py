"""The multiple-choice knapsack: one option a group, least summed loss at a cost within the budget. Pure maths.

A handful of groups is answered exactly; with many, the frontier is thinned, which stays within a fraction of a percent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

FRONTIER = 2048  # points kept of the cost-loss frontier while groups are merged
LEAST = 16  # of them for each option of a group that the next one shares a cost with


@dataclass(frozen=True)
class Table:
    """Loss and cost of each option of a group, [options]."""

    loss: np.ndarray
    cost: np.ndarray


def alike(table: Table) -> Table:
    """The table whose least loss takes the same fraction from every group: cost · (fraction removed)².

    At a given total cost the sum of c·f² over groups of cost c is least where every fraction f is the same.
    """
    dense = table.cost.max()
    return replace(table, loss=(dense - table.cost) ** 2 / max(dense, 1e-30))


@dataclass(frozen=True)
class Chain:
    """What several tables in a row offer together, [n]: loss, cost, and the option of each that makes it up."""

    table: Table
    options: np.ndarray  # [n, tables]

    @classmethod
    def of(cls, tables: Sequence[Table], twice: Sequence[np.ndarray]) -> Chain:
        """The cheapest choices at every loss, thinned.

        Args:
            twice: what each table and the next one count both, of every option beside every option of the next.
        """
        chain = cls(tables[0], np.arange(len(tables[0].cost))[:, None])
        most = max(FRONTIER // max(len(table.cost) for table in tables), LEAST)
        for table, both in zip(tables[1:], twice, strict=True):  # the best that ends in each option of the next
            ends = [chain._then(option, table, both)._thinned(most) for option in range(len(table.cost))]
            names = ("loss", "cost")
            joined = Table(*(np.concatenate([getattr(end.table, name) for end in ends]) for name in names))
            chain = cls(joined, np.concatenate([end.options for end in ends]))
        return chain._thinned(FRONTIER) if len(tables) > 1 else chain

    def _then(self, option: int, table: Table, twice: np.ndarray) -> Chain:
        """Followed by an option of the next table."""
        cost = self.table.cost + table.cost[option] - twice[self.options[:, -1], option]
        longer = np.pad(self.options, ((0, 0), (0, 1)), constant_values=option)
        return Chain(Table(self.table.loss + table.loss[option], cost), longer)

    def _thinned(self, most: int) -> Chain:
        cost, loss = self.table.cost, self.table.loss
        order = _thin(_frontier(np.arange(len(cost)), cost, loss), cost, most)
        return Chain(Table(loss[order], cost[order]), self.options[order])


def chains(tables: Sequence[Table], twice: Mapping[int, np.ndarray]) -> list[Chain]:
    """The tables, joined wherever one shares a cost with the next: `twice` gives it by the number of the first."""
    starts = [i for i in range(len(tables)) if i - 1 not in twice]
    return [
        Chain.of(tables[start:end], [twice[i] for i in range(start, end - 1)])
        for start, end in zip(starts, (*starts[1:], len(tables)), strict=True)
    ]


def chosen_of(chains: Sequence[Chain], budget: float) -> list[int] | None:
    """`knapsack` of tables that are joined to chains: one option per table."""
    chosen = knapsack([chain.table for chain in chains], budget)
    if chosen is None:
        return None
    return [int(i) for chain, option in zip(chains, chosen, strict=True) for i in chain.options[option]]


def knapsack(tables: Sequence[Table], budget: float) -> list[int] | None:
    """One option per table: least total loss with total cost <= budget. None if no choice is within it."""
    budget = budget * (1 + 1e-12)
    if budget < 0:
        return None
    reserve = np.cumsum([0.0, *[table.cost.min() for table in reversed(tables)]])[::-1][1:]  # what later tables need
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for table, later in zip(tables, reserve, strict=True):
        all_cost = (cost[:, None] + table.cost).ravel()
        all_loss = (loss[:, None] + table.loss).ravel()
        order = np.flatnonzero(all_cost + later <= budget)
        if not len(order):
            return None
        order = _thin(_frontier(order, all_cost, all_loss), all_cost)
        steps.append((order // len(table.cost), order % len(table.cost)))
        cost, loss = all_cost[order], all_loss[order]
    return _trace(steps, int(loss.argmin()))


def _frontier(points: np.ndarray, cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Of these points those that no other one beats (Pareto), sorted by cost."""
    order = points[np.lexsort((loss[points], cost[points]))]
    best = np.minimum.accumulate(loss[order])
    return order[np.flatnonzero(np.concatenate([[True], best[1:] < best[:-1]]))]


def _thin(order: np.ndarray, cost: np.ndarray, most: int = FRONTIER) -> np.ndarray:
    """At most so many points of a frontier sorted by cost: the dearest (so the best) of each cost bin."""
    if len(order) <= most:
        return order
    edges = np.linspace(cost[order[0]], cost[order[-1]], most)
    return order[np.unique(np.searchsorted(cost[order], edges, side="right") - 1)]


def _trace(steps: list[tuple[np.ndarray, np.ndarray]], point: int) -> list[int]:
    chosen = []
    for previous, option in reversed(steps):
        chosen.append(int(option[point]))
        point = int(previous[point])
    return chosen[::-1]
