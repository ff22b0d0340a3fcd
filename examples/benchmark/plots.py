"""Plots from cells: accuracy against measured latency, perplexity against parameters. One line a method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from tables import good, keeps_in, names_in, where

Cell = dict[str, Any]
Point = tuple[float, float]
MARKERS = "osD^v<>PX*hp8d"
LOG_SPAN = 50  # a logarithmic axis ends at this many times its least value: what is beyond is of no use


def plot(cells: list[Cell], out: Path) -> list[Path]:
    """Every plot that the cells allow, as PNG files; none where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("No plots: matplotlib is not installed (pip install '.[benchmark]').")
        return []
    matplotlib.use("Agg")
    quality, written = good(where(cells, part="quality")), []
    for task in dict.fromkeys(cell["task"] for cell in quality):
        some = where(quality, task=task)
        panels = _perplexity(some) if "perplexity_brown" in some[0] else _accuracy(some)
        if panels:
            written.append(_draw(some, panels, out / f"{task}.png"))
    return written


def _mean(cells: list[Cell], key: str) -> float:
    return fmean(cell[key] for cell in cells)


def _accuracy(cells: list[Cell]) -> list[tuple[str, str, str, Callable[[list[Cell]], Point | None]]]:
    """A panel for each latency shape: mean accuracy over seeds; latency of seed 0 against dense in the same minutes."""

    def point(index: int) -> Callable[[list[Cell]], Point | None]:
        def find(same: list[Cell]) -> Point | None:
            timed = [cell for cell in same if cell["latency"]]
            return (1 / timed[0]["latency"][index]["speedup"], _mean(same, "accuracy")) if timed else None

        return find

    shapes = next((cell["latency"] for cell in cells if cell["latency"]), [])
    return [
        (
            f"batch {at['batch']} × {at['length']} tokens",
            "latency / latency of dense, measured in turn",
            "accuracy",
            point(i),
        )
        for i, at in enumerate(shapes)
    ]


def _perplexity(cells: list[Cell]) -> list[tuple[str, str, str, Callable[[list[Cell]], Point | None]]]:
    def point(text: str) -> Callable[[list[Cell]], Point | None]:
        return lambda same: (same[0]["size"]["params_model"] / 1e6, _mean(same, f"perplexity_{text}"))

    return [
        (t.title(), "parameters (M)", f"perplexity (log scale; beyond {LOG_SPAN} × dense not shown)", point(t))
        for t in ("brown", "austen")
    ]


def _draw(cells: list[Cell], panels: list[Any], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels) + 2, 5), squeeze=False, layout="constrained")
    for axis, (title, x, y, point) in zip(axes[0], panels, strict=True):
        for index, name in enumerate(names_in(cells)):
            groups = [where(cells, method=name, keep=keep) for keep in (1.0, *keeps_in(cells))]
            found = [at for at in (point(group) for group in groups if group) if at]
            style = {"color": plt.colormaps["tab20"](index % 20), "marker": MARKERS[index % len(MARKERS)]}
            width = 2.2 if name.startswith("hf_prune") else 1.0
            axis.plot(*zip(*found, strict=True) if found else ([], []), label=name, linewidth=width, **style)
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        if "log" in y:
            axis.set_yscale("log")
            least = min(y for line in axis.lines for y in line.get_ydata())
            axis.set_ylim(0.9 * least, LOG_SPAN * least)
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
