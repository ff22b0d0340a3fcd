"""The model card of a pruned checkpoint, with its pictures: rendered from the JSON files in its directory alone."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.history import PLAN_FILE, REPORT_FILE
from ..checkpoint.hub import HUB_ID
from ..checkpoint.proof import checkpoint
from ..files import write_text
from . import plots
from .engines import checkpoint_rows, opened_by, opening_lines, task_of
from .evidence import DENSE, EVALUATION, PRUNED, Evidence
from .int8 import INT8_FILE, int8_line, int8_rows
from .quote import code, fenced, line, quoted
from .render import MEASUREMENTS, measured_rows, setting_line
from .table import Row, count, markdown

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURES = "pictures"
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "rmse", "mae", "wer", "cer")  # in a metric's name
LOOK_UP = 5.0  # seconds for the base model's card on the Hub


def write_card(
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model: str | None = None,
    note: str | None = None,
    **metadata: Any,
) -> Path:
    """Write README.md and its pictures beside the weights. Every number in them is read from a JSON file there.

    Args:
        name: what opens it, a Hub id or a path; default: the directory's name.
        base_model: Hub id; default: what the model was loaded from, where that is one.
        note: a sentence for the card's limits.
        metadata: fields of huggingface_hub's ModelCardData (license, datasets, language, ...) in place of what is found
            here and on the base model's card; `tags` are added.

    Raises:
        ValueError: no directory that hf_prune saved, or files in it that were edited.
        TypeError: `name`, `base_model` or `note` is not a string.
    """
    directory = checkpoint(directory)
    if not (directory / PLAN_FILE).is_file() or not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds no pruned checkpoint (no {PLAN_FILE}): give a directory that hf_prune saved."
        )
    for given in (name, base_model, note):
        if not isinstance(given, str | None):
            raise TypeError(f"name, base_model and note are words, got {type(given).__name__}.")
    found = Evidence(directory)
    found.check()
    try:
        card = _card(found, line(name or directory.name), line(base_model or found.base_model), note, metadata)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{directory}: the files that its card is made of ({', '.join(found.there)}) do not hold what hf_prune "
            f"writes ({error!r}). Remove the one that was edited, or make it again."
        ) from error
    path = directory / "README.md"
    write_text(path, f"{card}\n")
    return path


def _card(found: Evidence, name: str, base_model: str, note: str | None, metadata: Mapping[str, Any]) -> Any:
    from huggingface_hub import ModelCard

    directory, pictures = found.directory, _draw(found)
    return ModelCard.from_template(
        _metadata(found, name, base_model, metadata),
        template_path=str(TEMPLATE),
        name=quoted(Path(name).name),
        headline=_headline(found, base_model),
        summary_table=markdown(summary_rows(found)),
        opening_lines=fenced("\n".join(opening_lines(directory, name)), "python"),
        opened_by=f"Opens with {opened_by(directory)}.\n\n" + markdown(checkpoint_rows(directory)),
        speed=_speed(found, name),
        int8=_int8(found),
        kept=fenced(found.plan.summary()),
        made=_made(found),
        recipe=fenced(yaml.safe_dump(_recipe(found, base_model), sort_keys=False).strip(), "yaml"),
        limits=_limits(found, note),
        sources=_sources(found),
        **pictures,
    )


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(found: Evidence, name: str, base_model: str, given: Mapping[str, Any]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    task = task_of(found.config)
    data = found.evaluation
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=line(data["dataset"]),
            dataset_name=line(data["dataset"]),
            dataset_split=line(data["split"]) if data.get("split") else None,
            metric_type=line(metric),
            metric_name=f"{line(metric)}{label}",
            metric_value=value,
        )
        for metric, (dense, pruned) in found.metrics().items()
        for label, value in ((" (pruned)", pruned), (" (dense, before pruning)", dense))
        if value is not None
    ]
    fields: dict[str, Any] = {
        "base_model": base_model or None,
        "base_model_relation": "finetune" if base_model else None,
        "library_name": "transformers",
        "datasets": [data["dataset"]] if HUB_ID.fullmatch(str(data.get("dataset", ""))) else None,
        "pipeline_tag": task,
        "model_name": Path(name).name if results else None,
        "eval_results": results or None,
        "tags": ["pruned", "structured-pruning", "hf_prune", *given.get("tags", ())],
    }
    given = {key: value for key, value in given.items() if value is not None and key != "tags"}
    known = {"license": line(found.summary["license"])} if "license" in found.summary else {}
    carried = known if known or "license" in given or not base_model else _licence_of(base_model)
    return ModelCardData(**{**fields, **carried, **given})


def _licence_of(base_model: str) -> dict[str, str]:
    """The licence fields of the base model's card on the Hub; {} where it cannot be read."""
    from huggingface_hub import HfApi

    try:
        data: Any = HfApi().model_info(base_model, timeout=LOOK_UP).card_data or {}
        return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    except Exception:  # no such repository, no network, no metadata: then the card states no licence
        return {}


# --- text ------------------------------------------------------------------------------------------------------------


def _headline(found: Evidence, base_model: str) -> str:
    """What the cut lost and gained, in one sentence."""
    name = quoted(Path(base_model or found.origin).name) or "The model"
    text = f"**{name} with {found.share('macs_model'):.0%} of its multiply-adds and"
    text += f" {found.share('params_model'):.0%} of its parameters"
    parts = [
        f"{quoted(metric)} {pruned:.4g}" + (f" (dense {dense:.4g})" if dense is not None else "")
        for metric, (dense, pruned) in found.metrics().items()
    ]
    for at in found.measured[PRUNED]["latency"][:1] if found.measured else ():
        parts.append(f"{at['speedup']:.2f}× as fast at {at['batch']} × {at['length']} tokens")
    return f"{text}: {', '.join(parts)}.**" if parts else f"{text}.** Neither evaluated nor measured yet."


def summary_rows(found: Evidence) -> list[Row]:
    """Quality, sizes and speed of both models, as far as they are known."""
    rows: list[Row] = [
        {"": f"{quoted(metric)} ({_data(found.evaluation)})"}
        | {DENSE: "–" if dense is None else f"{dense:.4f}", PRUNED: f"{pruned:.4f}"}
        for metric, (dense, pruned) in found.metrics().items()
    ]
    for title, key in (("parameters", "params_model"), ("multiply-adds", "macs_model")):
        before, after = found.cost(key)
        rows.append({"": title, DENSE: count(before), PRUNED: f"{count(after)} ({after / before:.0%})"})
    for kept in (kept for kept in found.plan.kept if len(kept.where) < 3):  # of a stack, or of the whole model
        title = " of the ".join(dict.fromkeys((quoted(kept.axis), *map(quoted, kept.where))))
        rows.append({"": title, DENSE: f"{kept.of:,}", PRUNED: f"{len(kept.kept):,}"})
    timed = measured_rows(found.measured) if found.measured else []
    return rows + [row for row in timed if row[""].startswith(("size", "memory", "forward", "decode"))]


def _data(evaluation: Mapping[str, Any]) -> str:
    rows, dataset = evaluation.get("rows"), quoted(evaluation["dataset"])
    return f"{rows:,} rows of {dataset}" if rows else dataset


def _speed(found: Evidence, name: str) -> str:
    if not found.measured:
        word = shlex.quote(name)
        return (
            f"Not measured: {code(f'hf-prune bench DENSE {word} --out {word}')}, then {code(f'hf-prune card {word}')}."
        )
    notes = [f"The pruned model is {quoted(note)}" for note in found.measured[PRUNED]["notes"]]
    return "\n\n".join([_table(measured_rows(found.measured)), quoted(setting_line(found.measured)), *notes])


def _table(rows: list[Row]) -> str:
    """A table whose names and figures come from a file."""
    return markdown([{quoted(name): quoted(cell) for name, cell in row.items()} for row in rows])


def _int8(found: Evidence) -> str:
    tables = [f"{_table(int8_rows(engine))}\n\n{quoted(int8_line(engine))}" for engine in found.int8]
    return "\n\n".join(tables)


def _made(found: Evidence) -> str:
    cuts = "one cut" if len(found.cuts) < 2 else f"{len(found.cuts)} cuts"
    text = f"By hf_prune {quoted(found.summary.get('version', version('hf-prune')))}, in {cuts}"
    if found.cuts:
        seen = found.cuts[-1]["calibration"]
        each = "each " if len(found.cuts) > 1 else ""
        text += f", {each}calibrated on {seen['rows']:,} examples ({seen['tokens']:,} tokens)"
    return f"{text}. The exact settings of the last cut; the plan with every kept unit is in `{PLAN_FILE}`:"


def _recipe(found: Evidence, base_model: str) -> dict[str, Any]:
    config = found.cuts[-1]["config"] if found.cuts else dict(found.plan.config)
    return {"base_model": base_model or found.origin, "pruning": dict(config), "plan": found.plan.hash}


def _limits(found: Evidence, note: str | None) -> str:
    lines = [
        "- Latency is of the machine named above; multiply-adds are arithmetic.",
        "- What the dense model gets wrong, this one does too. Quality was looked at on the data named above alone.",
    ]
    worse = [m for m, (dense, pruned) in found.metrics().items() if dense is not None and _is_worse(m, dense, pruned)]
    if worse:
        lines.append(f"- Lower quality than the dense model in: {', '.join(map(quoted, worse))}.")
    if note:
        lines.append(f"- {quoted(note)}")
    return "\n".join(lines)


def _is_worse(metric: str, dense: float, pruned: float) -> bool:
    lower = any(word in metric.lower() for word in LOWER_IS_BETTER)
    return pruned > dense if lower else pruned < dense


def _sources(found: Evidence) -> str:
    parts = {
        EVALUATION: f"quality ({quoted(found.evaluation.get('command', ''))})",
        MEASUREMENTS: "latency, sizes, memory",
        PLAN_FILE: "kept units",
        REPORT_FILE: "scores, settings, repairs",
        INT8_FILE: "INT8",
    }
    used = {EVALUATION: found.evaluation, MEASUREMENTS: found.measured, INT8_FILE: found.int8}
    there = [name for name in parts if used.get(name, (found.directory / name).is_file())]
    return "\n".join(f"- `{name}`: {parts[name]}" for name in there)


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw(found: Evidence) -> dict[str, str | None]:
    """Draw the pictures that the evidence allows. Their paths relative to the card; None for those not drawn."""
    drawn: dict[str, str | None] = dict.fromkeys(("kept_units", "scores", "before_after", "tradeoff"))
    if not plots.can_draw():
        return drawn
    home = found.directory / PICTURES
    home.mkdir(exist_ok=True)

    def path(name: str) -> Path:
        drawn[name] = f"{PICTURES}/{name}.png"
        return home / f"{name}.png"

    plots.kept_units(found.plan, path("kept_units"))
    if found.cuts and found.cuts[-1]["scores"]:
        plots.scores(found.cuts[-1], path("scores"))
    plots.before_after(_bars(found), path("before_after"))
    quality = _tradeoff(found)
    if quality:
        plots.tradeoff(**quality, path=path("tradeoff"))
    return drawn


def _tradeoff(found: Evidence) -> dict[str, Any] | None:
    """The first metric against the first latency: of dense and pruned, in INT8 too where that was measured."""
    models, engine = {}, "torch"
    if found.int8:
        models, engine = found.int8[0]["models"], found.int8[0]["engine"]
    elif found.evaluation:
        results = found.evaluation["results"]
        models = {name: {**row, "metrics": results.get(name, {})} for name, row in found.measured.items()}
    everywhere = [m for m in found.metrics() if all(m in model["metrics"] for model in models.values())]
    if not models or not everywhere or not all(model["latency"] for model in models.values()):
        return None
    at, metric = next(iter(models.values()))["latency"][0], everywhere[0]
    return {
        "points": {plots.word(n): (m["latency"][0]["median_ms"], m["metrics"][metric]) for n, m in models.items()},
        "metric": plots.word(metric),
        "where": plots.word(f"{engine}, {at['what']} {at['batch']} × {at['length']}"),
    }


def _bars(found: Evidence) -> list[tuple[str, float, str]]:
    rows = []
    for metric, (dense, pruned) in found.metrics().items():
        if dense:
            rows.append((plots.word(metric), pruned / dense, f"{pruned:.4g} of {dense:.4g}"))
    for title, key in (("multiply-adds", "macs_model"), ("parameters", "params_model")):
        rows.append((title, found.share(key), count(found.cost(key)[1])))
    for entry in found.measured.get(PRUNED, {}).get("latency", ()):
        what = plots.word(f"{entry['what']} {entry['batch']} × {entry['length']}")
        rows.append((what, 1 / entry["speedup"], f"{entry['median_ms']:.1f} ms, {entry['speedup']:.2f}×"))
    return rows
