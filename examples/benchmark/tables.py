"""Markdown tables from cells. Nothing is computed here that needs a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hf_prune.report.table import Row, count, markdown

Cell = dict[str, Any]
Differences = list[float]
TITLES = {
    "encoder": "MiniLM-L6, Rotten Tomatoes",
    "imdb": "MiniLM-L6, IMDB",
    "llm": "SmolLM2-135M, judged on texts that it was not calibrated on",
    "recovery": "MiniLM-L6, Rotten Tomatoes, one epoch after the cut",
    "llm_recovery": "SmolLM2-135M, trained after the cut, judged on other texts",
}
CAPTION = (
    "Points of accuracy lost against the dense model of the same seed, ± standard error of the mean over validation "
    "rows (paired; a row's differences are averaged over seeds first, so the error holds for these fine-tunings). "
    "**Bold**: best of the column; *: within one paired standard error of it."
)


def names_in(cells: Iterable[Cell]) -> list[str]:
    """Methods in the order of the rows, those that are no row any more last."""
    from methods import METHODS

    order = {method.name: index for index, method in reversed(list(enumerate(METHODS)))}
    return sorted(dict.fromkeys(cell["method"] for cell in cells), key=lambda name: order.get(name, len(order)))


def keeps_in(cells: Iterable[Cell]) -> list[float]:
    return sorted({cell["keep"] for cell in cells if cell["method"] != "dense"}, reverse=True)


def where(cells: Iterable[Cell], **wanted: Any) -> list[Cell]:
    return [cell for cell in cells if all(cell.get(key) == value for key, value in wanted.items())]


def good(cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if "error" not in cell]


# --- accuracy: paired differences ------------------------------------------------------------------------------------


def paired(first: Sequence[Cell], second: Sequence[Cell]) -> Differences | None:
    """right(first) - right(second) for each example, averaged over the seeds that both have."""
    left, right = ({cell["seed"]: cell["right"] for cell in cells} for cells in (first, second))
    seeds = [seed for seed in left if seed in right]
    if not seeds:
        return None
    rows = zip(*(zip(left[seed], right[seed], strict=True) for seed in seeds), strict=True)
    return [fmean(int(a) - int(b) for a, b in row) for row in rows]


def standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def drop_table(cells: list[Cell]) -> list[Row]:
    """One row a method, one column a keep."""
    dense = good(where(cells, method="dense"))
    columns = {f"{keep:.0%}": "–" for keep in keeps_in(cells)}  # in this order, whatever each row has
    rows = [{"": name} | columns for name in names_in(cells) if name != "dense"]
    for keep in keeps_in(cells):
        at = {name: good(where(cells, method=name, keep=keep)) for name in names_in(cells)}
        drops = {name: paired(dense, found) for name, found in at.items() if found}
        drops = {name: found for name, found in drops.items() if found}
        best = min(drops, key=lambda name: fmean(drops[name]), default=None)
        for row in rows:
            name = row[""]
            if name in drops:
                more = paired(at[best], at[name])
                close = more is not None and fmean(more) <= standard_error(more)
                text = f"{100 * fmean(drops[name]):.1f} ± {100 * standard_error(drops[name]):.1f}"
                row[f"{keep:.0%}"] = f"**{text}**" if name == best else f"{text} *" if close else text
            elif where(cells, method=name, keep=keep):
                row[f"{keep:.0%}"] = "error"
    return rows


# --- figures where smaller (or larger) is better ---------------------------------------------------------------------


def figure_table(cells: list[Cell], key: str, form: str, better: Callable[..., float]) -> list[Row]:
    """One row a method, one column a keep: the mean over seeds, ± the standard deviation where there are several."""
    columns = {f"{keep:.0%}": "–" for keep in keeps_in(cells)}
    rows = [{"": name} | columns for name in names_in(cells)]
    dense = [cell[key] for cell in good(where(cells, method="dense"))]
    for keep in keeps_in(cells):
        found = {
            name: [cell[key] for cell in good(where(cells, method=name, keep=keep))] for name in names_in(cells)
        } | {"dense": dense}
        means = {name: fmean(values) for name, values in found.items() if values and name != "dense"}
        best = better(means.values()) if means else None
        for row in rows:
            values = found[row[""]]
            if values:
                spread = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
                text = f"{fmean(values):{form}}{spread}"
                row[f"{keep:.0%}"] = f"**{text}**" if means.get(row[""]) == best else text
            elif where(cells, method=row[""], keep=keep):
                row[f"{keep:.0%}"] = "error"
    return rows


def size_table(cells: list[Cell], target: str) -> list[Row]:
    """Size and latency of the models of the first seed."""
    rows = []
    for name in names_in(cells):
        for cell in sorted(good(where(cells, method=name, seed=0)), key=lambda cell: -cell["keep"]):
            size, dense = cell["size"], cell["dense_size"]
            row = {
                "": name,
                "keep": f"{cell['keep']:.0%}",
                f"kept of {target}": f"{cell['kept']:.3f}",
                "MACs": f"{count(size['macs_model'])} ({size['macs_model'] / dense['macs_model']:.0%})",
                "parameters": f"{count(size['params_model'])} ({size['params_model'] / dense['params_model']:.0%})",
                "MB": f"{size['bytes'] / 1e6:.1f}",
            }
            for at in cell["latency"]:
                row[f"{at['batch']} × {at['length']}"] = f"{at['speedup']:.2f}× ({at['median_ms']:.1f} ms)"
            rows.append(row)
    return rows


def cost_table(cells: list[Cell]) -> list[Row]:
    rows = []
    for name in names_in(cells):
        row = {"": name}
        for cell in where(cells, method=name):
            label = f"{cell['task']}, keep {cell['keep']:.0%}"
            row[f"{label}: seconds"] = "error" if "error" in cell else f"{cell['seconds']:.1f}"
            row[f"{label}: peak memory above the model"] = "error" if "error" in cell else f"{cell['peak']:.2f}×"
        rows.append(row)
    return rows


# --- the document ----------------------------------------------------------------------------------------------------


def footnotes(cells: list[Cell]) -> str:
    lines = {f"- {cell['method']}: {cell['note']}." for cell in cells if cell["note"]}
    for cell in cells:
        at = f"- {cell['method']}, keep {cell['keep']:.0%}, seed {cell['seed']}: "
        if "error" in cell:
            text = " ".join(cell["error"].split())
            lines.add(f"{at}`{text[:300]}`")
        elif "same_as" in cell:
            lines.add(f"{at}the very same model as {cell['same_as']}.")
    return "\n".join(sorted(lines))


def _made_with(settings: Cell, seeds: Sequence[int]) -> str:
    rows = f"{settings['calibration']} calibration rows of at most {settings['length']} tokens"
    return f"Seeds: {', '.join(map(str, seeds))}; {rows}."


def task_part(name: str, cells: list[Cell]) -> str:
    seeds = sorted({cell["seed"] for cell in cells})
    blocks = [f"## {TITLES.get(name, name)}", _made_with(cells[0]["settings"], seeds)]
    done = good(cells)
    if any("perplexity_brown" in cell for cell in done):
        for text in ("brown", "austen"):
            blocks += [f"Perplexity, {text.title()}", markdown(figure_table(cells, f"perplexity_{text}", ".1f", min))]
        length = len(done[0]["right"])
        blocks += [f"Cloze accuracy ({length} items, chance 0.25)"]
        blocks += [markdown(figure_table(cells, "accuracy", ".2f", max))]
    elif where(done, method="dense"):
        accuracy = ", ".join(f"{cell['accuracy']:.4f}" for cell in where(done, method="dense"))
        blocks += [f"Dense accuracy by seed: {accuracy}; {len(done[0]['right'])} validation rows. {CAPTION}"]
        blocks += [markdown(drop_table(cells))]
    target = "block parameters" if name.startswith("llm") else "MACs"
    if where(done, seed=0):
        blocks += [
            "Sizes, and speed-up over dense, measured in turn (seed 0; milliseconds of two rows are not of one moment)",
            markdown(size_table(done, target)),
        ]
    return "\n\n".join([*blocks, footnotes(cells)])


def write_tables(cells: list[Cell], path: Path) -> str:
    """tables.md; returns its text."""
    quality = where(cells, part="quality")
    parts = [task_part(name, where(quality, task=name)) for name in dict.fromkeys(cell["task"] for cell in quality)]
    cost = where(cells, part="cost")
    if cost:
        title = "## What pruning costs (a process for each; from model and rows in memory to the pruned model)"
        parts.append("\n\n".join([title, markdown(cost_table(cost)), footnotes([c for c in cost if "error" in c])]))
    text = "\n\n".join(["# Benchmark", *parts]) + "\n"
    path.write_text(text)
    return text
