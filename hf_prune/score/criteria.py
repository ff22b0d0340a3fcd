"""Criteria: statistics of one site -> one score per unit. Pure maths.

Shapes: U units, K = U*w input columns of the consumer, D output width, B examples, n tokens.
To add a criterion, write `score(statistics) -> [U]` and register it in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .factor import inverse_blocks

REPRESENTATION = 2.5e-4  # weight of representational knowledge in K-prune, as its authors run it


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
    gate: torch.Tensor | None = None  # the gate gradients themselves, [B, U]
    mean: torch.Tensor | None = None  # of the consumer's inputs over tokens, [K]
    square: torch.Tensor | None = None  # mean square of them, [K]
    gram: torch.Tensor | None = None  # X^T X / n, [K, K]
    generator: torch.Generator | None = None
    output: torch.Tensor | None = None  # Σ ggᵀ over tokens, mean over examples; g: at the consumer's output, [D, D]
    tokens: list[torch.Tensor] | None = None  # the squared lengths of these g, [B*T] per batch
    seen: torch.Tensor | None = None  # tokens that experts see: of each unit [U], or of the one whose neurons these are
    saliency: torch.Tensor | None = None  # mean over those tokens of the norm of what an expert adds to them, likewise

    def per_unit(self, columns: torch.Tensor) -> torch.Tensor:
        """Sum a value per column [K] over the columns of each unit [U]."""
        return columns.view(self.units, -1).sum(1)


def fisher(s: SiteStatistics) -> torch.Tensor:
    """Diagonal Fisher information of the gates: E[g²] (Kwon et al. 2022, section 3.3)."""
    return given(s.gate_square)


def fisher_obs(s: SiteStatistics) -> torch.Tensor:
    """Units in the order of Fisher x OBS error, both normalised over the site, with the site's Fisher as their sum.

    The gradients know what matters to the loss, the OBS error what the other units cannot take over in the repair.
    """
    by_loss, by_error = given(s.gate_square), hessian(s)
    product = by_loss * by_error
    return product * (by_loss.sum() / product.sum().clamp_min(1e-30))


def fisher_obs_root(s: SiteStatistics) -> torch.Tensor:
    """The same order within a site, by the geometric mean of both; their sum is the Fisher that repair leaves.

    A product is as uneven as its factors together: where a few neurons of a layer stand out, as the massive activations
    of language models do, all others would seem free, and the layer would be emptied. What repair leaves of a unit's
    Fisher is taken to be the part of its output's square that the others cannot take over.
    """
    by_loss, by_error = given(s.gate_square), hessian(s).clamp_min(0)
    output = s.per_unit(given(s.gram).diagonal() * s.weight.square().sum(0))  # mean over tokens of its square
    left = (by_loss * by_error / output.clamp_min(1e-30)).sum()
    root = (by_loss * by_error).sqrt()
    return root * (left / root.sum().clamp_min(1e-30))


def fisher_joint(s: SiteStatistics, damping: float = 0.01) -> torch.Tensor:
    """The same order; units share the loss of what they lose together, ½·tr(H·R), as far as it falls along the order.

    H is the Fisher information of the consumer's output, R what is left of the removed units' part of it when the
    others are refitted: W_P (G_PP - G_PS G_SS⁻¹ G_SP) W_Pᵀ. With G = LLᵀ, most important units first, R is the sum
    over the removed columns of (W·L)(W·L)ᵀ, so that one Cholesky gives the loss of every count. Errors of single units
    do not add up to it: each assumes that all the others stay.
    """
    width = len(given(s.gram)) // s.units
    order = fisher_obs(s).argsort(descending=True, stable=True)
    columns = (order[:, None] * width + torch.arange(width)).flatten()
    factor = torch.linalg.cholesky(_damped(s, damping)[columns][:, columns])
    outputs = s.weight.double()[:, columns] @ factor  # [D, K]
    added = 0.5 * s.per_unit(((given(s.output).double() @ outputs) * outputs).sum(0))
    score = torch.empty(s.units, dtype=torch.float64)
    score[order] = falling(added)
    return score.float()


def falling(values: torch.Tensor) -> torch.Tensor:
    """The sequence that falls strictly and is closest to `values` [U] in the least-squares sense, but for rounding.

    Neighbours that do not fall get their mean (pool adjacent violators), tilted by a millionth a unit, which single
    precision still tells apart.
    """
    blocks: list[tuple[float, int]] = []  # sum and length
    for value in values.tolist():
        total, length = value, 1
        while blocks and blocks[-1][0] * length <= total * blocks[-1][1]:
            before, more = blocks.pop()
            total, length = total + before, length + more
        blocks.append((total, length))
    means = torch.cat([values.new_full((length,), total / length) for total, length in blocks])
    return means * (1 - 1e-6 * torch.arange(len(values), dtype=values.dtype))


def kprune(s: SiteStatistics) -> torch.Tensor:
    """Predictive and representational knowledge, E[g²]/2 + λ·E‖x‖²·mean(W²) (K-prune, Park et al. 2024, section 3.2).

    K-prune scores again before each sublayer, with the KL divergence from the dense model. In one pass at the dense
    model that gradient is zero: the Fisher of labels drawn from the model, its second-order term, stands in.
    """
    representation = s.per_unit(given(s.square) * s.weight.square().mean(0))
    return given(s.gate_square) / 2 + REPRESENTATION * representation


def taylor(s: SiteStatistics) -> torch.Tensor:
    """First-order Taylor: E|g| (Michel et al. 2019, section 4.1; Molchanov et al. 2019)."""
    return given(s.gate_abs)


def magnitude(s: SiteStatistics) -> torch.Tensor:
    """L2 norm of all the weights of a unit."""
    return s.weight_square.sqrt()


def activation(s: SiteStatistics) -> torch.Tensor:
    """|W|·‖X‖ summed over a unit's weights in the consumer (Wanda, Sun et al. 2023, eq. 1, structured)."""
    return s.per_unit(s.weight.abs().sum(0) * given(s.square).sqrt())


def fluctuation(s: SiteStatistics) -> torch.Tensor:
    """Weighted input feature variance Var(X)·‖W‖² (FLAP, An et al. 2024, eq. 5)."""
    variance = (given(s.square) - given(s.mean) ** 2).clamp_min(0)
    return s.per_unit(variance * s.weight.square().sum(0))


def hessian(s: SiteStatistics, damping: float = 0.01) -> torch.Tensor:
    """Optimal Brain Surgeon error of removing a unit: tr(W_P [G⁻¹]_PP⁻¹ W_Pᵀ) with G = XᵀX/n + damping.

    The squared error of the consumer's output when the other units are refitted optimally (Hassibi & Stork 1993).
    `damping` is relative to the mean diagonal of G.
    """
    gram = given(s.gram)
    width = len(gram) // s.units
    penalty = torch.full_like(gram[0], damping) * gram.diagonal().mean().clamp_min(1e-12)
    blocks = inverse_blocks(gram, penalty, width)  # [U, w, w]
    weights = s.weight.view(-1, s.units, width).permute(1, 2, 0)  # [U, w, D]
    return (weights * torch.linalg.solve(blocks, weights)).sum((1, 2))


def reap(s: SiteStatistics) -> torch.Tensor:
    """Of an expert: the mean over its tokens of router weight x norm of its output (REAP, Lasby et al. 2025, eq. 9)."""
    return given(s.saliency)


def frequency(s: SiteStatistics) -> torch.Tensor:
    """Of an expert: the tokens that are sent to it."""
    return given(s.seen)


def random(s: SiteStatistics) -> torch.Tensor:
    """Uniform random scores: the control."""
    return torch.rand(s.units, generator=s.generator)


@dataclass(frozen=True)
class Criterion:
    """A row of `CRITERIA`.

    `needs`: "gradients" (their mean square and mean absolute value), "examples" (each example's own), "outputs" (those
    at the consumer's output), "moments" (mean and square of the inputs), "gram". `across` says how scores of different
    sites and kinds are made comparable: "as they are", divided by the site's "sum", or "standard": zero mean and unit
    variance over the site, and the lowest go first whatever they cost (FLAP, section 4.2). `labels`: those of the
    "data", or drawn from the "model" (then E[gg'] is the curvature of the KL divergence from the dense model). `of`:
    the axis that it is made for; "": any.
    """

    name: str
    score: Callable[[SiteStatistics], torch.Tensor]
    needs: tuple[str, ...] = ()
    across: Literal["as they are", "sum", "standard"] = "sum"
    labels: Literal["data", "model"] = "data"
    of: str = ""

    @property
    def needs_loss(self) -> bool:
        return "gradients" in self.needs


CRITERIA: dict[str, Criterion] = {
    row.name: row
    for row in (
        Criterion("fisher", fisher, ("gradients",), "as they are"),
        Criterion("fisher_model", fisher, ("gradients",), "as they are", "model"),
        Criterion("fisher_block", fisher, ("gradients", "examples"), "as they are"),
        Criterion("fisher_obs", fisher_obs, ("gradients", "gram"), "as they are"),
        Criterion("fisher_obs_root", fisher_obs_root, ("gradients", "gram"), "as they are"),
        Criterion("fisher_joint", fisher_joint, ("gradients", "outputs", "gram"), "as they are"),
        Criterion("kprune", kprune, ("gradients", "moments"), "as they are", "model"),
        Criterion("taylor", taylor, ("gradients",), "as they are"),
        Criterion("magnitude", magnitude),
        Criterion("activation", activation, ("moments",)),
        Criterion("fluctuation", fluctuation, ("moments",), "standard"),
        Criterion("hessian", hessian, ("gram",)),
        Criterion("reap", reap, ("moments",), of="experts"),
        Criterion("frequency", frequency, ("moments",), of="experts"),
        Criterion("random", random),
    )
}


def _damped(s: SiteStatistics, damping: float) -> torch.Tensor:
    """The Gram matrix in fp64 with `damping` of its mean diagonal on the diagonal, [K, K]."""
    gram = given(s.gram).double()
    return gram + damping * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError("These statistics were not collected for this criterion.")
    return tensor
