"""Losses between a pruned model and its teacher: tensors in, a scalar out.

Shapes: B examples, T tokens, D hidden width, V classes or vocabulary, n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

CHUNK_CPU, CHUNK_GPU = 2**20, 2**26  # logits of which the divergence is formed at a time: what a CPU's cache holds


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, chunk: int | None = None
) -> torch.Tensor:
    """The KL divergence of the student from the teacher at a temperature t, times t², averaged over rows.

    As in Hinton et al. 2015 ("Distilling the Knowledge in a Neural Network"), section 2. It is computed in fp32,
    `chunk` logits at a time and together with its gradient, so that apart from the logits only that gradient is as wide
    as the vocabulary. A row with a single value is a regression, and gets its squared error.

    Args:
        student, teacher: logits, [n, V].
        chunk: logits at a time; default: what a CPU's cache holds, more on a GPU.

    Returns:
        A scalar; 0 where there are no rows.
    """
    if not len(student):
        return student.sum() * 0.0
    if student.shape[-1] == 1:
        return functional.mse_loss(student.float(), teacher.float())
    chunk = chunk or (CHUNK_CPU if student.device.type == "cpu" else CHUNK_GPU)
    return _Divergence.apply(student, teacher, temperature, max(chunk // student.shape[-1], 1))


class _Divergence(torch.autograd.Function):
    """t² Σ p log(p/q) / n, and its gradient t (q - p) / n; p and q are the teacher's and the student's softmax at t."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, t: float, rows: int) -> torch.Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for some, others, slot in zip(student.split(rows), teacher.split(rows), gradient.split(rows), strict=True):
            ours, theirs = (some.float() / t).log_softmax(-1), (others.float() / t).log_softmax(-1)
            p = theirs.exp()
            total += theirs.sub_(ours).mul_(p).sum()
            slot.copy_(ours.exp_().sub_(p).mul_(t / len(student)))
        ctx.save_for_backward(gradient)
        return total * t**2 / len(student)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def relative_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean squared error, divided by the teacher's mean square.

    Hidden states of models and layers differ by orders of magnitude; relative to their size, one weight serves all.

    Args:
        student, teacher: hidden states, [B, T, D].
        mask: [B*T], True at the tokens that count; None: all of them.

    Returns:
        A scalar.
    """
    ours, theirs = (x.reshape(-1, x.shape[-1]).float() for x in (student, teacher))
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def layer_map(student: int, teacher: int, given: Sequence[int] | None) -> list[int]:
    """Which of the teacher's layers each layer of the student learns from; without a map they are spread evenly.

    Args:
        student, teacher: how many layers each has.
        given: one of the teacher's layers for each of the student's.

    Raises:
        ValueError: `given` has another length, or names layers that the teacher does not have; without it, the teacher
            has fewer layers than the student.

    >>> layer_map(3, 6, None)
    [1, 3, 5]
    """
    if given is not None:
        if len(given) != student or not all(0 <= layer < teacher for layer in given):
            raise ValueError(
                f"layer_map={list(given)}: give one of the teacher's layers 0..{teacher - 1} for each of the "
                f"student's {student}."
            )
        return list(given)
    if teacher < student:
        raise ValueError(
            f"The teacher has {teacher} layers, the student {student}: give layer_map, or set hidden_weight=0 and "
            "attention_weight=0."
        )
    return [(i + 1) * teacher // student - 1 for i in range(student)]
