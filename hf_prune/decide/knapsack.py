"""The multiple-choice knapsack: one option a group, least summed loss at a cost within the budget. Pure maths.

A handful of groups is answered exactly; with many, the frontier is thinned, which stays within a fraction of a percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FRONTIER = 2048  # points kept of the cost-loss frontier while groups are merged


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
