"""Criteria: statistics of one site -> one score per unit. Pure maths.

Shapes: U units, K = U*w input columns of the consumer, D output width, B examples, n tokens.
To add a criterion, write `score(statistics) -> [U]` and register it in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class SiteStatistics:
    """What one calibration pass knows about a site; what a criterion does not need is None. All fp32.

    Gate gradients are those of the per-example loss (mean over its labelled tokens) with respect to a scalar on each
    unit's input to the consumer, at 1.
    """

    units: int
    weight: torch.Tensor  # of the consumer, [D, K]
    weight_square: torch.Tensor  # sum of squares of all weights that a unit takes with it, [U]
    gate_square: torch.Tensor | None = None  # mean over examples of the squared gate gradient, [U]
    gate_abs: torch.Tensor | None = None  # mean over examples of its absolute value, [U]
    mean: torch.Tensor | None = None  # of the consumer's inputs over tokens, [K]
    square: torch.Tensor | None = None  # mean square of them, [K]
    gram: torch.Tensor | None = None  # X^T X / n, [K, K]
    generator: torch.Generator | None = None

    def per_unit(self, columns: torch.Tensor) -> torch.Tensor:
        """Sum a value per column [K] over the columns of each unit [U]."""
        return columns.view(self.units, -1).sum(1)


def fisher(s: SiteStatistics) -> torch.Tensor:
    """Diagonal Fisher information of the gates: E[g²] (Kwon et al. 2022, section 3.3)."""
    return _given(s.gate_square)


def taylor(s: SiteStatistics) -> torch.Tensor:
    """First-order Taylor: E|g| (Michel et al. 2019, section 4.1; Molchanov et al. 2019)."""
    return _given(s.gate_abs)


def magnitude(s: SiteStatistics) -> torch.Tensor:
    """L2 norm of all the weights of a unit."""
    return s.weight_square.sqrt()


def activation(s: SiteStatistics) -> torch.Tensor:
    """|W|·‖X‖ summed over a unit's weights in the consumer (Wanda, Sun et al. 2023, eq. 1, structured)."""
    return s.per_unit(s.weight.abs().sum(0) * _given(s.square).sqrt())


def fluctuation(s: SiteStatistics) -> torch.Tensor:
    """Weighted input feature variance Var(X)·‖W‖² (FLAP, An et al. 2024, eq. 5)."""
    variance = (_given(s.square) - _given(s.mean) ** 2).clamp_min(0)
    return s.per_unit(variance * s.weight.square().sum(0))


def hessian(s: SiteStatistics, damping: float = 0.01) -> torch.Tensor:
    """Optimal Brain Surgeon error of removing a unit: tr(W_P [G⁻¹]_PP⁻¹ W_Pᵀ) with G = XᵀX/n + damping.

    The squared error of the consumer's output when the other units are refitted optimally (Hassibi & Stork 1993).
    `damping` is relative to the mean diagonal of G.
    """
    gram = _given(s.gram).double()
    gram = gram + damping * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    width = len(gram) // s.units
    blocks = inverse.view(s.units, width, s.units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [U, w, w]
    weights = s.weight.double().view(-1, s.units, width).permute(1, 2, 0)  # [U, w, D]
    return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2)).float()


def random(s: SiteStatistics) -> torch.Tensor:
    """Uniform random scores: the control."""
    return torch.rand(s.units, generator=s.generator)


@dataclass(frozen=True)
class Criterion:
    """`needs`: "gradients", "moments" (mean and square), "gram" or None. `comparable`: scores of different sites and
    kinds measure the same thing; otherwise they are normalised per site before kinds are weighed against each other."""

    name: str
    score: Callable[[SiteStatistics], torch.Tensor]
    needs: str | None
    comparable: bool


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("fisher", fisher, "gradients", comparable=True),
        Criterion("taylor", taylor, "gradients", comparable=True),
        Criterion("magnitude", magnitude, None, comparable=False),
        Criterion("activation", activation, "moments", comparable=False),
        Criterion("fluctuation", fluctuation, "moments", comparable=False),
        Criterion("hessian", hessian, "gram", comparable=False),
        Criterion("random", random, None, comparable=False),
    )
}


def _given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("These statistics were not collected for this criterion.")
    return tensor
