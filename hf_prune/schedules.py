"""How fast a model shrinks: the fraction that remains as a function of progress."""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float, float], float]  # (final keep, progress from 0 to 1) -> keep at that progress


def constant(keep: float, progress: float) -> float:
    """The same fraction of what is left at every step, as in iterative magnitude pruning (Frankle and Carbin 2019).

    >>> round(constant(0.25, 0.5), 3)
    0.5
    """
    return keep**progress


def linear(keep: float, progress: float) -> float:
    """The same amount at every step.

    >>> linear(0.5, 0.5)
    0.75
    """
    return 1 - (1 - keep) * progress


def cubic(keep: float, progress: float) -> float:
    """Much at first, little at the end (Zhu and Gupta 2017, "To prune, or not to prune", equation 1).

    >>> cubic(0.5, 0.5)
    0.5625
    """
    return keep + (1 - keep) * (1 - progress) ** 3


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cubic": cubic}


def targets(schedule: str, keep: float, rounds: int) -> list[float]:
    """What remains after each round; the last is `keep`.

    >>> targets("linear", 0.5, 2)
    [0.75, 0.5]
    """
    return [SCHEDULES[schedule](keep, (i + 1) / rounds) for i in range(rounds - 1)] + [keep]


def shares(steps: int, rounds: int, recovery: float) -> list[int]:
    """The step at which each round ends: the last round gets the share `recovery` of all steps, the others equal parts.

    Raises:
        ValueError: a round without a step.

    >>> shares(100, 3, 0.5)
    [25, 50, 100]
    """
    early = 0.0 if rounds == 1 else (1 - recovery) / (rounds - 1)
    ends = [round(steps * early * (i + 1)) for i in range(rounds - 1)] + [steps]
    if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
        raise ValueError(
            f"rounds={rounds} with recovery={recovery:g} do not fit into {steps} steps: every round needs one at "
            "least. Train longer (max_steps, num_train_epochs), or in fewer rounds."
        )
    return ends
