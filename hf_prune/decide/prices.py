"""Losses predicted for unlike kinds of unit, brought to one measure by the few that were measured.

What is predicted for neurons (squared errors), for layers (the loss without them, before any repair) and for tokens
(how often they were read) has three meanings. Each is taken to be worth a price in real loss, the prices are fitted to
what was measured, and what is tried next is the best at these prices.

Shapes: N divisions of a budget, K kinds of unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def next_to_try(kinds: Floats, measured: Mapping[int, float]) -> int:
    """The division to measure next: first, for each kind, that which takes most from it; then the best at the prices.

    Args:
        kinds: [N, K], what is predicted of each kind in each division, each kind in its own measure.
        measured: by division, what it lost (infinite where the cut model breaks); not all of them.
    """
    shares = kinds / np.maximum(np.abs(kinds).max(0), np.finfo(float).tiny)
    for index in _extremes(shares):
        if index not in measured:
            return index
    finite = {index: loss for index, loss in measured.items() if np.isfinite(loss)}
    losses = shares @ prices(shares[[*finite]], np.array([*finite.values()]))
    return min((index for index in range(len(kinds)) if index not in measured), key=losses.__getitem__)


def prices(kinds: Floats, losses: Floats) -> Floats:
    """The non-negative prices [K] at which `kinds` [N, K] come closest to the measured `losses` [N] (least squares)."""
    best, least = np.zeros(kinds.shape[1]), float(np.square(losses).sum())
    every = range(kinds.shape[1])
    for some in map(list, chain.from_iterable(combinations(every, size + 1) for size in every)):
        found = np.linalg.lstsq(kinds[:, some], losses, rcond=None)[0]
        error = float(np.square(kinds[:, some] @ found - losses).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(len(best)), error
            best[some] = found
    return best


def _extremes(shares: Floats) -> list[int]:
    """For each kind that differs at all, the division that takes most from it, and of those least from the others."""
    differ = [kind for kind in range(shares.shape[1]) if np.ptp(shares[:, kind])]
    return [max(range(len(shares)), key=lambda i: (shares[i, kind], -shares[i].sum())) for kind in differ]
