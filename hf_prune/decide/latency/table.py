"""A table of measured milliseconds, as a cost model, and the maths that makes it of timings. Nothing is timed here.

Legend: a site is timed at G counts of its outer axis (KV groups, neurons), and in each unit of that at E counts of its
inner axis (query heads a group; 1 where a site has one axis).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...model.sites import Counts
from ...plan import Where
from ..costs import CostModel

TINY = 1e-30  # seconds; a divisor where nothing could be saved
Level = tuple[float, float]  # (share saved of what all sites could save alone, share that the whole model still takes)


@dataclass(frozen=True)
class Grid:
    """The counts at which a site is timed, ascending: of its outer axis, and of the inner in each unit of that."""

    axes: list[str]  # outer, inner
    groups: list[int]
    each: list[int]


def evenly(values: Sequence[int], points: int) -> list[int]:
    """At most `points` of the values, evenly spaced, with both ends."""
    return [values[i] for i in sorted({round(i) for i in np.linspace(0, len(values) - 1, points)})]


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds of one site at counts of its outer axis x units of the inner in each, linear in between."""

    axes: list[str]  # outer, inner
    groups: list[int]
    each: list[int]
    ms: list[list[float]]  # [G, E]

    def site(self, counts: Counts) -> float:
        groups, each = counts[self.axes[0]], counts[self.axes[1]] / max(counts[self.axes[0]], 1)
        columns = [np.interp(groups, self.groups, column) for column in zip(*self.ms, strict=True)]
        return float(np.interp(each, self.each, columns))


@dataclass(frozen=True)
class LatencyTable(CostModel):
    """Milliseconds of every site at every count, and whether they come from the cache."""

    cached: bool = False
    spread: float = 1.0  # of the dense passes: median over fastest

    @property
    def source(self) -> str:
        return "cache" if self.cached else "measured"


def table_of(
    dense_ms: float,
    alone: Mapping[Where, np.ndarray],
    levels: Sequence[Level],
    grids: Mapping[Where, Grid],
    bare: float = 0.0,
) -> LatencyTable:
    """The table whose sites share the model's time in the proportion that their layers save it alone.

    The sum over the sites is the measured time of the whole model at every level, and linear between levels.

    Args:
        dense_ms: milliseconds of the dense model.
        alone: seconds of a site's layer at every count of the site, [G, E], never less for more units.
        levels: what the whole model took with a share of the units of all sites, the largest share first.
        bare: share of the dense model's time that each layer still takes with the fewest units of its sites.
    """
    savings = {key: seconds - seconds[0, 0] for key, seconds in alone.items()}
    most = max(sum(float(seconds[-1, -1]) for seconds in savings.values()), TINY)
    kept = [*(1 - saved for saved, _ in reversed(levels)), 1.0]
    takes = np.maximum.accumulate([*(taken for _, taken in reversed(levels)), 1.0]).clip(max=1.0)
    units = {}
    for key, seconds in savings.items():
        whole = float(seconds[-1, -1])
        curve = np.interp(seconds / max(whole, TINY), kept, takes - takes[0])
        ms = (dense_ms * whole / most * curve).tolist()
        units[key] = MeasuredCost(grids[key].axes, grids[key].groups, grids[key].each, ms)
    layers = {key[:2]: dense_ms * bare for key in alone}
    return LatencyTable("latency", dense_ms * float(takes[0]) - sum(layers.values()), units, layers)


def monotone(ms: np.ndarray) -> np.ndarray:
    """The mean of the least non-decreasing table above the measured one and the greatest below it; any shape."""
    above, below = ms, ms
    for axis in range(ms.ndim):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2
