"""Pictures of a pruned model: what was kept, how the scores lie, what it gained. Each is drawn from JSON alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plan import Kept, PruningPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT, CUT, DENSE, PRUNED = "#2a6f97", "#e9ecef", "#adb5bd", "#2a6f97"
COLOURS = (DENSE, PRUNED, "#e07a5f", "#81b29a", "#f2cc8f", "#6d597a")
DPI = 130


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def word(text: Any) -> str:
    """A name from a file as one line of a picture: matplotlib takes what stands between two $ for a formula."""
    return " ".join(str(text).split()).replace("$", r"\$")


def _figure(columns: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'hf-prune[plots]'.") from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        axes = figure.subplots(1, columns, squeeze=False)[0]
    return figure, axes


def _write(figure: Figure, path: Path) -> None:
    """Under another name first, so that a card never shows half a picture."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=DPI, format="png")
    temporary.replace(path)


MAPPED = 40  # units of a site; more would be stripes


def _groups(plan: PruningPlan) -> dict[tuple[str, str], list[Kept]]:
    """Sites by (stack, kind), each in the order of its layers."""
    groups: dict[tuple[str, str], list[Kept]] = {}
    for site in sorted(plan.sites, key=lambda site: site.where[1]):
        stack, _, kind = site.where
        groups.setdefault((stack, kind), []).append(site)
    return groups


def kept_units(plan: PruningPlan, path: Path) -> None:
    """A panel for each kind of site: which of a few units stay, as a map; how many of many, as bars."""
    groups = _groups(plan)
    depth = max(len(sites) for sites in groups.values())
    figure, axes = _figure(len(groups), 4.2 * len(groups), max(2.6, 0.24 * depth + 1.2))
    for axis, ((stack, kind), sites) in zip(axes, groups.items(), strict=True):
        _map(axis, sites) if max(site.of for site in sites) <= MAPPED else _widths(axis, sites)
        axis.set(ylabel="layer", title=word(f"{stack} {kind.replace('_', ' ')}" if kind != "ffn" else f"{stack} FFN"))
        axis.set_yticks(range(0, len(sites), max(1, len(sites) // 15)))
        axis.set_ylim(len(sites) - 0.5, -0.5)
    _write(figure, path)


def _map(axis: Axes, sites: Sequence[Kept]) -> None:
    from matplotlib.colors import ListedColormap

    widest = max(site.of for site in sites)
    grid = [[float(unit in set(site.kept)) for unit in range(widest)] for site in sites]
    rows, columns = ([i - 0.5 for i in range(count + 1)] for count in (len(sites), widest))
    colours = ListedColormap([CUT, KEPT])
    axis.pcolormesh(columns, rows, grid, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    axis.set_xticks(range(0, widest, max(1, widest // 12)))
    axis.set_xlabel(f"{sites[0].axis.replace('kv_', 'KV ')} (dark: kept)")


def _widths(axis: Axes, sites: Sequence[Kept]) -> None:
    layers = [site.where[1] for site in sites]
    axis.barh(layers, [site.of for site in sites], color=CUT)
    axis.barh(layers, [len(site.kept) for site in sites], color=KEPT)
    for site in sites:
        axis.text(len(site.kept), site.where[1], f" {len(site.kept):,}", va="center", fontsize=7)
    axis.set_xlabel(f"{sites[0].axis} kept, of {max(site.of for site in sites):,}")


def scores(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each kind of site, a line a layer: the scores of its units in ascending order."""
    from matplotlib import colormaps

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for site in report["scores"]:
        groups.setdefault((site["stack"], site["kind"]), []).append(site)
    figure, axes = _figure(len(groups), 4.8 * len(groups), 3.4)
    for axis, ((stack, kind), sites) in zip(axes, groups.items(), strict=True):
        for site in sites:
            shade = colormaps["viridis"](site["layer"] / max(len(sites) - 1, 1))
            values = site["quantiles"]
            axis.plot([i / (len(values) - 1) for i in range(len(values))], values, color=shade, linewidth=1)
        axis.set(title=word(f"{stack} {kind}"), xlabel="share of the units, ascending", ylabel="score")
        axis.set_yscale("log")
    figure.suptitle(f"{word(report['criterion'])} scores; dark: first layers, light: last", fontsize=9)
    _write(figure, path)


def latency_bars(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A panel for each thing timed, a bar a model: median milliseconds, and a whisker up to the 90th percentile."""
    entries = next(iter(found.values()))["latency"]
    figure, axes = _figure(max(len(entries), 1), max(2.2 * len(entries), 3), 3.2)
    for index, (axis, entry) in enumerate(zip(axes, entries, strict=False)):
        for place, (name, model) in enumerate(found.items()):
            at = model["latency"][index]
            above = at["p90_ms"] - at["median_ms"]
            axis.bar(place, at["median_ms"], yerr=[[0], [above]], color=COLOURS[place % len(COLOURS)], label=name)
            axis.text(
                place,
                at["median_ms"] / 2,
                f"{at['speedup']:.2f}×",
                color="white" if place else "black",
                ha="center",
                va="center",
                fontsize=8,
            )
        axis.set(title=f"{entry['what']}\n{entry['batch']} × {entry['length']}", ylabel="ms" if not index else "")
        axis.title.set_fontsize(9)
        axis.set_xticks([])
    if entries:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(found), fontsize=8)
    _write(figure, path)


def before_after(rows: Sequence[tuple[str, float, str]], path: Path) -> None:
    """What is left of the dense model, a bar a figure. rows: (what, share of dense, text)."""
    figure, (axis,) = _figure(1, 6.4, 0.42 * len(rows) + 0.9)
    for place, (_, share, text) in enumerate(rows):
        axis.barh(place, 1, color=CUT)
        axis.barh(place, share, color=KEPT)
        axis.text(max(share, 1) + 0.01, place, f" {text}", va="center", fontsize=8)
    axis.set_yticks(range(len(rows)), [what for what, _, _ in rows])
    axis.set(xlabel="share of the dense model", xlim=(0, max(1.0, *(share for _, share, _ in rows)) * 1.45))
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axis.invert_yaxis()
    _write(figure, path)


def tradeoff(points: Mapping[str, tuple[float, float]], metric: str, where: str, path: Path) -> None:
    """Quality against measured latency, a point a model. points: name -> (ms, metric)."""
    figure, (axis,) = _figure(1, 5, 3.6)
    for place, (name, (ms, value)) in enumerate(points.items()):
        axis.scatter(ms, value, s=60, color=COLOURS[place % len(COLOURS)], zorder=2)
        axis.annotate(f" {name}", (ms, value), fontsize=8, va="center")
    axis.set(xlabel=f"ms, {where}", ylabel=metric)
    axis.set_xlim(0, 1.25 * max(ms for ms, _ in points.values()))
    values = [value for _, value in points.values()]
    room = max(0.6 * (max(values) - min(values)), 0.02 * max(values))  # small differences look small
    axis.set_ylim(min(values) - room, max(values) + room)
    axis.grid(alpha=0.3)
    _write(figure, path)
