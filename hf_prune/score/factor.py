"""Cholesky factors of second moments in fp32. Pure maths.

Shapes: K columns.
"""

from __future__ import annotations

import torch


def factored(gram: torch.Tensor, penalty: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor L [K, K] of D (G + diag(penalty)) D, and the D [K] that gives it a diagonal of ones.

    Columns of unlike size then cost no precision (van der Sluis 1969). It is found in fp64 where fp32 finds the matrix
    not positive.
    """
    matrix = gram + torch.diag(penalty)
    scale = matrix.diagonal().rsqrt()
    matrix.mul_(scale[:, None]).mul_(scale)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        factor = torch.linalg.cholesky(matrix.double()).to(gram.dtype)
    return factor, scale


def solved(gram: torch.Tensor, penalty: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """X with X (G + diag(penalty)) = targets; X and targets: [D, K]."""
    factor, scale = factored(gram, penalty)
    return torch.cholesky_solve((targets * scale).T, factor).T * scale


def inverse_blocks(gram: torch.Tensor, penalty: torch.Tensor, width: int) -> torch.Tensor:
    """The blocks [K/w, w, w] on the diagonal of (G + diag(penalty))⁻¹."""
    factor, scale = factored(gram, penalty)
    inverse, scale = torch.cholesky_inverse(factor), scale.view(-1, width)
    blocks = inverse.view(len(scale), width, len(scale), width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return blocks * scale[:, :, None] * scale[:, None, :]
