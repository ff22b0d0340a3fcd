"""A picture of rows: one line for each choice of units, quality against what is left of the dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter

Row = Mapping[str, Any]


def draw(
    rows: Sequence[Row], dense: float, panels: Mapping[str, str], y: str, path: Path, scale: str = "linear"
) -> None:
    """Write a PNG file with a panel for each of `panels`.

    Args:
        rows: with `units` (a line each), `keep` (those of the same units and target are averaged) and the figures.
        dense: the dense model's `y`, as a dashed line.
        panels: the key of the x axis, and what to write there.
    """
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.8 * len(panels), 3.8), squeeze=False, sharey=True)
    for axis, (x, title) in zip(axes[0], panels.items(), strict=True):
        for units in dict.fromkeys(row["units"] for row in rows):
            targets = dict.fromkeys(row["keep"] for row in rows if row["units"] == units)
            same = [[row for row in rows if (row["units"], row["keep"]) == (units, keep)] for keep in targets]
            points = sorted((fmean(row[x] for row in some), fmean(row[y] for row in some)) for some in same)
            axis.plot(*zip(*points, strict=True), marker="o" if units == "together" else ".", label=units)
        axis.axhline(dense, color="grey", linestyle="--", linewidth=1, label="dense")
        axis.set(xlabel=title)
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel=y.replace("_", " "), yscale=scale)
    for formatted in (axes[0][0].yaxis.set_major_formatter, axes[0][0].yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
