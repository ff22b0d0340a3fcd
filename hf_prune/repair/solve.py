"""Closed-form correction of the weights that remain, to match the dense model sublayer by sublayer. Pure maths.

Shapes: n tokens, S kept input columns of the consumer and one more where it has a bias (A = [X_S, 1]), D outputs.

The refit solves W' = argmin ‖A W'ᵀ - R‖² + λ‖W' - W_S‖² (bias unpenalised). R blends two targets: *own*, the dense
projection of all inputs (kept and cut) in the pruned stream; and *residual*, which adds r = (dense stream after the
sublayer) - (pruned stream before it) - own, and so also corrects what went wrong below.
What a sublayer reads is set right too, as far as a linear map can: an identity in front of its first matrices is
refitted in the same way, from the pruned stream to the dense one, and folded into them.
Sources: OBS (Hassibi & Stork 1993), whose many-column form W G_:S G_SS⁻¹ is the own target without a ridge;
Kwon et al. 2022, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..score.factor import solved

RIDGES = (0.001, 0.01, 0.1, 1.0)  # relative to the mean diagonal of AᵀA
BLENDS = (0.0, 0.5, 1.0)  # 0 own target, 1 residual target
GRADIENT_SHARE = 0.5  # of a token's weight in a refit
COLUMNS = 1024  # of a matrix that are in fp64 at a time
TOKENS_A_COLUMN = 10  # fewer calibration tokens per refitted column raise the ridge


class Moments:
    """Sums over tokens, fp32: AᵀA [S, S], ownᵀA and rᵀA [D, S], and ‖own + r‖²."""

    def __init__(self, outputs: int, columns: int, has_bias: bool, device: torch.device) -> None:
        self.has_bias = has_bias
        self.gram = torch.zeros(columns + has_bias, columns + has_bias, device=device)
        self.own = torch.zeros(outputs, columns + has_bias, device=device)
        self.residual = torch.zeros_like(self.own)
        self.target_square = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = 0

    def add(
        self, x: torch.Tensor, own: torch.Tensor, residual: torch.Tensor, weights: torch.Tensor | None = None
    ) -> None:
        """x: kept inputs [n, S]; own, residual: [n, D]; weights: of tokens [n, 1], about 1 in the mean; all fp32."""
        a = torch.cat([x, x.new_ones(len(x), 1)], 1) if self.has_bias else x
        if weights is not None:
            a, own, residual = (value * weights.sqrt() for value in (a, own, residual))
        self.gram.addmm_(a.T, a)
        self.own.addmm_(own.T, a)
        self.residual.addmm_(residual.T, a)
        self.target_square += (own + residual).square().sum()
        self.tokens += len(x)

    def __add__(self, other: Moments) -> Moments:
        total = Moments(len(self.own), len(self.gram) - self.has_bias, self.has_bias, self.gram.device)
        for name in ("gram", "own", "residual", "target_square", "tokens"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def error(self, weight: torch.Tensor) -> float:
        """Mean over tokens of ‖A W'ᵀ - (own + r)‖² for weight W' [D, S]."""
        weight = weight.double()
        square = (weight @ self.gram.double() * weight).sum()
        cross = (weight * (self.own.double() + self.residual.double())).sum()
        return float((square - 2 * cross + self.target_square) / max(self.tokens, 1))


def token_weights(squares: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """How much each token counts in a refit, [B*T, 1] per batch: half alike, half by its squared loss gradient.

    To second order the loss grows with the squared gradient (the Fisher) at each token times its squared error; a token
    that no prediction reads (all but the first in the last layer of a BERT classifier) need not be right. The other
    half keeps the problem well posed.

    Args:
        squares: of the loss gradient at a sublayer's output, [B*T] per batch.
        masks: True at real tokens, [B*T] per batch, None where all are.
    """
    real = [square if mask is None else square[mask] for square, mask in zip(squares, masks, strict=False)]
    mean = torch.cat(real).double().mean().float().clamp_min(1e-30)
    share = GRADIENT_SHARE if mean > 1e-30 else 0.0
    return [(1 - share + share * square / mean)[:, None] for square in squares]


@dataclass(frozen=True)
class Refit:
    """What became of one consumer. Errors are mean squares per token against the residual target, on the held-out rows
    of the calibration data."""

    weight: torch.Tensor  # [D, S], with the bias as last column where there is one
    ridge: float | None
    blend: float | None
    error_before: float
    error_after: float

    @property
    def accepted(self) -> bool:
        return self.error_after < self.error_before


def best_of(weight: torch.Tensor, candidates: Iterable[torch.Tensor], held_out: Sequence[Moments]) -> Refit:
    """The candidate [D, S] of least held-out error; the plain cut `weight` [D, S] where none lowers it.

    Args:
        held_out: sets of rows, first those of the calibration data; empty ones do not count.
    """
    sets = [moments for moments in held_out if moments.tokens]
    before = [moments.error(weight) for moments in sets]
    tried = ((candidate, [moments.error(candidate) for moments in sets]) for candidate in candidates)
    first = before[0] if sets else 0.0
    best = least(before, tried)
    return Refit(weight, None, None, first, first) if best is None else Refit(best[0], None, None, first, best[1][0])


def least(before: Sequence[float], tried: Iterable[tuple[Any, Sequence[float]]]) -> tuple[Any, Sequence[float]] | None:
    """What has the least sum of errors relative to those `before`, of all that is better on every set of rows.

    Args:
        tried: something, and its error on each set.
    """
    best, bound = None, float(len(before))
    for each, errors in tried if before else ():
        ratios = [error / max(plain, 1e-30) for error, plain in zip(errors, before, strict=True)]
        if max(ratios) < 1 and sum(ratios) < bound:
            best, bound = (each, errors), sum(ratios)
    return best


@dataclass(frozen=True)
class Shortfall:
    """What the plain cut W_S leaves to do on a set of rows: the normal equations of a correction Δ of it, [D, S].

    A correction is small where weights are not, and what it changes of the error is not lost in the error itself: fp32
    is enough for both.
    """

    gram: torch.Tensor  # AᵀA [S, S]
    own: torch.Tensor  # ownᵀA - W_S AᵀA [D, S]
    residual: torch.Tensor  # rᵀA [D, S]
    has_bias: bool
    tokens: int
    before: float  # mean over tokens of the plain cut's squared error

    @classmethod
    def of(cls, weight: torch.Tensor, moments: Moments) -> Shortfall:
        """weight: what the plain cut leaves, [D, S], the bias as last column where there is one."""
        weight, own, residual = weight.double(), moments.own.double(), moments.residual.double()
        missing = own - torch.cat([weight @ columns.double() for columns in moments.gram.split(COLUMNS, 1)], 1)
        square = moments.target_square - (weight * (missing + own + 2 * residual)).sum()
        tokens = moments.tokens
        return cls(
            moments.gram, missing.float(), moments.residual, moments.has_bias, tokens, float(square / max(tokens, 1))
        )

    def corrections(self, ridge: float, with_residual: bool = True) -> tuple[torch.Tensor, ...]:
        """The refit towards the own target, and what a whole residual adds to it; [D, S] each.

        Args:
            ridge: relative to the mean diagonal of AᵀA.
        """
        columns = len(self.gram) - self.has_bias
        penalty = torch.full_like(self.gram[0], ridge) * self.gram.diagonal()[:columns].mean().clamp_min(1e-12)
        if self.has_bias:
            penalty[-1] = 0
        targets = [self.own, self.residual] if with_residual else [self.own]
        found = solved(self.gram, penalty + 1e-9 * penalty.max(), torch.cat(targets))
        return found.split(len(self.own))

    def errors(self, corrections: Sequence[torch.Tensor], blends: Sequence[float]) -> list[float]:
        """Mean over tokens of ‖A (W_S + Δ)ᵀ - (own + r)‖² for the Δ of each blend, a square function of it."""
        wanted, (first, *more) = self.own + self.residual, corrections
        product = first @ self.gram
        terms = [_dot(first, product - 2 * wanted), 0.0, 0.0]
        for slope in more:
            terms[1] = 2 * _dot(slope, product - wanted)
            terms[2] = _dot(slope, slope @ self.gram)
        return [
            self.before + (terms[0] + blend * terms[1] + blend**2 * terms[2]) / max(self.tokens, 1) for blend in blends
        ]


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def blended(weight: torch.Tensor, corrections: Sequence[torch.Tensor], blend: float) -> torch.Tensor:
    """The plain cut with a correction, [D, S]."""
    first, *more = corrections
    return sum((blend * slope for slope in more), start=weight.float() + first)


def refit(
    weight: torch.Tensor,
    calibration: Moments,
    held_out: Sequence[Moments],
    blends: Sequence[float] = BLENDS,
    ridges: Sequence[float] = RIDGES,
) -> Refit:
    """Least squares with the ridge and blend of least held-out error; the plain cut [D, S] where none is better.

    Once they are chosen, the rows of the first held-out set, drawn like the others, are fitted as well. The errors are
    those of the choice, before that.
    """
    start = Shortfall.of(weight, calibration)
    sets = [Shortfall.of(weight, moments) for moments in held_out if moments.tokens]
    shortage = max(1.0, TOKENS_A_COLUMN * weight.shape[1] / max(calibration.tokens, 1))

    def tried() -> Iterator[tuple[tuple[float, float], tuple[float, ...]]]:
        for ridge in ridges if calibration.tokens else ():
            corrections = start.corrections(ridge * shortage, any(blends))
            errors = zip(*(each.errors(corrections, blends) for each in sets), strict=True)
            yield from zip(((ridge * shortage, blend) for blend in blends), errors, strict=True)

    before = [each.before for each in sets]
    best, first = least(before, tried()), before[0] if sets else 0.0
    if best is None:
        return Refit(weight, None, None, first, first)
    (ridge, blend), errors = best
    return Refit(solve(weight, calibration + held_out[0], ridge, [blend])[0], ridge, blend, first, errors[0])


def solve(weight: torch.Tensor, moments: Moments, ridge: float, blends: Sequence[float]) -> list[torch.Tensor]:
    """The refitted weights [D, S] for each blend.

    Args:
        weight: what the plain cut leaves, [D, S], the bias as last column where there is one.
        ridge: relative to the mean diagonal of AᵀA.
    """
    corrections = Shortfall.of(weight, moments).corrections(ridge, any(blends))
    return [blended(weight, corrections, blend) for blend in blends]


def fold(matrix: torch.Tensor, adapter: torch.Tensor, offset: bool) -> torch.Tensor:
    """The matrix [P, S] that reads x as `matrix` [P, D] reads the adapted x; where it has a bias, as last column.

    Args:
        adapter: [D, S], or [D, S+1] with an `offset` as last column, then `matrix` has a bias too.
    """
    width = len(adapter)
    folded, bias = matrix[:, :width].double() @ adapter.double(), matrix[:, width:].double()
    if offset:
        folded[:, -1:] += bias
        return folded
    return torch.cat([folded, bias], 1)


def rescale(weight: torch.Tensor, calibration: Moments, held_out: Sequence[Moments], columns_a_unit: int) -> Refit:
    """One scale per kept unit: least squares over s in Σ_u s_u·X_u W_uᵀ ≈ own + r, if held-out error falls.

    Kwon et al. 2022, section 3.4 (mask tuning): damped towards 1, and refused where a scale leaves [-10, 10].
    """
    columns = weight.shape[1] - calibration.has_bias
    matrix = weight[:, :columns].double()
    products = (matrix.T @ matrix) * calibration.gram[:columns, :columns].double()  # [S, S]
    wanted = (calibration.own + calibration.residual)[:, :columns].double()
    if calibration.has_bias:
        wanted -= weight[:, -1:].double() @ calibration.gram[-1:, :columns].double()
    units = columns // columns_a_unit
    gram = products.view(units, columns_a_unit, units, columns_a_unit).sum((1, 3))
    damping = gram.diagonal().mean().clamp_min(1e-12) * RIDGES[0]
    target = (wanted * matrix).sum(0).view(units, -1).sum(1) + damping
    scale = torch.linalg.solve(gram + damping * torch.eye(units, dtype=gram.dtype, device=gram.device), target)
    scaled = weight.double().clone()
    scaled[:, :columns] = matrix * scale.repeat_interleave(columns_a_unit)
    return best_of(weight, [scaled] if scale.abs().max() <= 10 else [], held_out)


def shift_bias(weight: torch.Tensor, calibration: Moments, held_out: Sequence[Moments]) -> Refit:
    """Bias compensation only: b' = b + W_P·mean(X_P) (FLAP, An et al. 2024, eq. 7), if held-out error falls."""
    missing = calibration.own[:, -1].double() - weight.double() @ calibration.gram[:, -1].double()
    shifted = weight.double().clone()
    shifted[:, -1] += missing / max(calibration.tokens, 1)
    return best_of(weight, [shifted], held_out)


class ChannelSums:
    """Sums over tokens for one regression per channel, y ≈ scale·z + shift. All [D], fp64 over batches."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.z, self.zz, self.y, self.zy, self.yy = torch.zeros(5, width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, z: torch.Tensor, y: torch.Tensor) -> None:
        """z: norm output in the pruned stream, y: what it should be; [n, D] fp32."""
        self.tokens += len(z)
        for total, value in ((self.z, z), (self.zz, z * z), (self.y, y), (self.zy, z * y), (self.yy, y * y)):
            total += value.sum(0)

    def error(self, scale: torch.Tensor, shift: torch.Tensor) -> float:
        """Mean over tokens of ‖scale·z + shift - y‖²."""
        square = scale**2 * self.zz + 2 * scale * shift * self.z + self.tokens * shift**2
        cross = scale * self.zy + shift * self.y
        return float((square - 2 * cross + self.yy).sum() / max(self.tokens, 1))


def refit_channels(
    calibration: ChannelSums, held_out: Sequence[ChannelSums], with_shift: bool
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift [D] per channel; None where they do not lower the error of every held-out set."""
    c, n = calibration, max(calibration.tokens, 1)
    mean_z, mean_y = (c.z / n, c.y / n) if with_shift else (torch.zeros_like(c.z), torch.zeros_like(c.y))
    variance = (c.zz / n - mean_z**2).clamp_min(1e-12)
    scale = (c.zy / n - mean_z * mean_y) / variance
    shift = mean_y - scale * mean_z
    identity = torch.ones_like(scale), torch.zeros_like(shift)
    sets = [sums for sums in held_out if sums.tokens]
    is_better = bool(sets) and all(sums.error(scale, shift) < sums.error(*identity) for sums in sets)
    return (scale, shift) if is_better else None
