"""Measurements as a table, a line about how they were taken, and files: JSON, Markdown and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_text
from .table import Row, count, markdown

MEASUREMENTS = "measurements.json"
Measured = Mapping[str, Mapping[str, Any]]  # what `measure.compare` returns; the first is the dense model
SIZES = {
    "parameters": "parameters",
    "parameters in blocks": "block_parameters",
    "MACs": "macs",
    "size on disk": "bytes",
    "memory when run": "resident_bytes",
    "KV cache per token": "kv_cache_bytes",
}


def measured_rows(found: Measured) -> list[Row]:
    """One row a figure, one column a model; shares and speed-ups are of the first model."""
    first = next(iter(found.values()))
    rows: list[Row] = []
    for title, key in SIZES.items():
        known = {name: m[key] for name, m in found.items() if m[key]}
        if known:
            unit = "B" if "bytes" in key else ""
            shares = {name: f" ({value / first[key]:.0%})" if first[key] else "" for name, value in known.items()}
            cells = {name: f"{count(value)}{unit}{shares[name]}" for name, value in known.items()}
            label = f"{title}, {first['sequence_length']} tokens" if key == "macs" else title
            rows.append({"": label} | cells)
    loads = {name: f"{m['load_seconds']:.2f} s" for name, m in found.items() if m["load_seconds"]}
    if loads:
        rows.append({"": "time to load"} | loads)
    for index, entry in enumerate(first["latency"]):
        at = {name: m["latency"][index] for name, m in found.items()}
        label = f"{entry['what']}, {entry['batch']} × {entry['length']}"
        rows.append({"": label} | {name: f"{e['median_ms']:.1f} ms ({e['speedup']:.2f}×)" for name, e in at.items()})
        if entry["what"] in ("prefill", "decode"):
            rows.append({"": "– tokens/s"} | {name: f"{e['tokens_per_second']:,.0f}" for name, e in at.items()})
    return rows


def setting_line(found: Measured) -> str:
    """How and where the figures were measured, in one sentence."""
    first = next(iter(found.values()))
    at, latency = first["settings"], first["latency"]
    runs = f"Median of {latency[0]['runs']} interleaved runs, unpadded" if latency else "Nothing was timed"
    return (
        f"{runs}; {at['dtype']}, {at['attention']} attention, {at['device_name']}, {at['threads']} threads, "
        f"torch {at['torch']}, transformers {at['transformers']}."
    )


def write(found: Measured, directory: Path) -> None:
    """Write the figures as measurements.json, .md and, with matplotlib, .png."""
    from . import plots

    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / MEASUREMENTS, json.dumps(found, indent=1) + "\n")
    text = f"{markdown(measured_rows(found))}\n\n{setting_line(found)}\n"
    write_text((directory / MEASUREMENTS).with_suffix(".md"), text)
    if plots.can_draw():
        plots.latency_bars(found, (directory / MEASUREMENTS).with_suffix(".png"))
