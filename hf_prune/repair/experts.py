"""Refit what remains of a layer of experts towards what the dense one gives, expert by expert. Pure maths.

A token's output is the sum over its experts of weight x (W h + b), linear in all W at once. One expert after the other
is fitted to what the others leave (block coordinate descent), each by the least squares of `solve`.

Shapes: n tokens, k experts of a token, E experts that remain, S kept neurons of each (and one more where there is a
bias), D outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .solve import BLENDS, Moments, refit

SWEEPS = 2  # over all experts


@dataclass(frozen=True)
class Routed:
    """What the experts of every token read, and what their sum should be; all fp32."""

    inputs: torch.Tensor  # weight x neurons (and the weight itself, where there is a bias), [n, k, S]
    index: torch.Tensor  # which experts they are, [n, k]
    own: torch.Tensor  # what the dense experts give in the pruned stream, [n, D]
    residual: torch.Tensor  # what is missing of the dense stream besides, [n, D]
    sets: torch.Tensor  # 0: fitted to, others: held out, [n]
    weights: torch.Tensor | None = None  # of tokens, [n, 1]

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that an expert sees [m], and its inputs there [m, S]."""
        rows, places = (self.index == expert).nonzero(as_tuple=True)
        return rows, self.inputs[rows, places]


@dataclass(frozen=True)
class Refitted:
    """Errors are mean squares per token against the residual target, on the first held-out set."""

    matrices: torch.Tensor  # [E, D, S]
    accepted: int  # experts whose refit lowers the held-out error
    error_before: float
    error_after: float


def refit_experts(matrices: torch.Tensor, routed: Routed, blends: Sequence[float] = BLENDS) -> Refitted:
    """Least squares for each expert in turn, most used first; the plain cut where none lowers the held-out error.

    Args:
        matrices: of the down projections as the cut leaves them, [E, D, S], the bias as last column.
    """
    found = matrices.clone()
    missing = routed.own - _sum(found, routed)
    before, accepted = _error(missing + routed.residual, routed), set()
    order = torch.bincount(routed.index.flatten(), minlength=len(found)).argsort(descending=True)
    for _ in range(SWEEPS):
        for expert in order.tolist():
            rows, x = routed.of(expert)
            wanted = missing[rows] + x @ found[expert].T
            fitted = _fit(found[expert], x, wanted, routed, rows, blends)
            if fitted is not None:
                accepted.add(expert)
                found[expert] = fitted
                missing[rows] = wanted - x @ fitted.T
    after = _error(missing + routed.residual, routed)
    if after < before:
        return Refitted(found, len(accepted), before, after)
    return Refitted(matrices, 0, before, before)


def _fit(
    matrix: torch.Tensor,
    x: torch.Tensor,
    wanted: torch.Tensor,
    routed: Routed,
    rows: torch.Tensor,
    blends: Sequence[float],
) -> torch.Tensor | None:
    """One expert's new matrix [D, S], if it lowers the error of every held-out set. x: [m, S], wanted: [m, D]."""
    sums = []
    for number in range(int(routed.sets.max()) + 1):
        here = routed.sets[rows] == number
        moments = Moments(len(matrix), matrix.shape[1], False, matrix.device)
        weights = None if routed.weights is None else routed.weights[rows][here]
        moments.add(x[here], wanted[here], routed.residual[rows][here], weights)
        sums.append(moments)
    result = refit(matrix, sums[0], sums[1:], blends)
    return result.weight.float() if result.accepted else None


def _sum(matrices: torch.Tensor, routed: Routed) -> torch.Tensor:
    """What the experts give, [n, D]."""
    total = torch.zeros_like(routed.own)
    for expert in range(len(matrices)):
        rows, x = routed.of(expert)
        total.index_add_(0, rows, x @ matrices[expert].T)
    return total


def _error(difference: torch.Tensor, routed: Routed) -> float:
    """On the first held-out set, or on all rows where there is none. difference: [n, D]."""
    rows = routed.sets == 1
    return float(difference[rows if rows.any() else slice(None)].double().square().sum(1).mean())
