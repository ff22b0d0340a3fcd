"""The units of one site in order of importance, and which of them a count keeps. Pure maths.

Shapes: U units, G groups of R units, B examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Count = tuple[int, int]  # (groups, units in each of them)


@dataclass(frozen=True)
class Ranking:
    """The units of one site (or of coupled sites) in order of importance."""

    axis: str
    scores: np.ndarray  # [G, R]: R units in each of G groups; where there are no groups, each unit is its own
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
