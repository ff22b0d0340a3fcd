"""The model card of a pruned checkpoint, with its pictures: rendered from the JSON files in its directory alone."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint import auto_classes
from ..data import TASKS
from ..files import write_text
from ..layout import KEY
from ..oneshot import PLAN_FILE, REPORT_FILE
from ..plan import PruningPlan
from . import plots
from .corners import CORNERS_FILE, corner_line, corner_rows
from .engines import checkpoint_rows, opened_by, opening_lines
from .render import MEASUREMENTS, measured_rows, setting_line
from .table import Row, count, markdown

TEMPLATE = Path(__file__).with_name("card.md.jinja")
EVALUATION = "evaluation.json"
PICTURES = "pictures"
DENSE, PRUNED = "dense", "pruned"
HIGHER_IS_BETTER = ("accuracy", "f1", "exact_match", "rouge1", "rougeL", "spearmanr", "pearson", "matthews_correlation")


@dataclass(frozen=True)
class Evidence:
    """What the files beside the weights say. A missing file leaves its part of the card out."""

    directory: Path

    def _json(self, name: str) -> Any:
        path = self.directory / name
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def config(self) -> dict[str, Any]:
        return self._json("config.json")

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.directory / PLAN_FILE)

    @cached_property
    def cuts(self) -> list[dict[str, Any]]:
        return list(self._json(REPORT_FILE).get("cuts", ()))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """{"dataset", "split", "rows", "command", "results": {"dense": {metric: value}, "pruned": {...}}}"""
        return self._json(EVALUATION)

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """What `hf-prune bench DENSE DIRECTORY --out DIRECTORY` found; dense first."""
        found = self._json(MEASUREMENTS)
        return dict(zip((DENSE, PRUNED), found.values(), strict=False))

    @cached_property
    def corners(self) -> list[dict[str, Any]]:
        """What `corners.corners` found, by engine."""
        return list(self._json(CORNERS_FILE) or ())

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.config[KEY]

    @property
    def base_model(self) -> str:
        return str(self.summary.get("base_model") or "")

    def share(self, key: str) -> float:
        """Of the dense model; key as in `costs.report`: macs_model, params_blocks, ..."""
        return self.summary["after"][key] / self.summary["before"][key]

    def metrics(self) -> dict[str, tuple[float | None, float]]:
        """name -> (dense, pruned)"""
        results = self.evaluation.get("results", {})
        return {name: (results.get(DENSE, {}).get(name), value) for name, value in results.get(PRUNED, {}).items()}


def write_evaluation(
    directory: Path, results: Mapping[str, Any], *, dataset: str, split: str, rows: int | None, command: str
) -> None:
    """evaluation.json. results: {"dense": {metric: value}, "pruned": {...}}; the dense ones may be missing."""
    found = {"dataset": dataset, "split": split, "rows": rows, "command": command, "results": results}
    write_text(directory / EVALUATION, json.dumps(found, indent=1) + "\n")


def write_card(
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
) -> Path:
    """README.md and its pictures, beside the weights. Every number in them is read from a JSON file there.

    Args:
        name: default: the directory's.
        base_model: Hub id; default: what the model was loaded from.
        license: default: that of the base model's card.
        datasets: Hub ids; default: what evaluation.json names.

    Raises:
        ValueError: no directory that hf_prune saved.
    """
    directory = Path(directory)
    if not (directory / PLAN_FILE).is_file() or not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds no pruned checkpoint (no {PLAN_FILE}): give a directory that hf_prune saved."
        )
    from huggingface_hub import ModelCard

    found = Evidence(directory)
    name = name or directory.resolve().name
    base_model = base_model or found.base_model
    pictures = _draw(found)
    card = ModelCard.from_template(
        _metadata(found, name, base_model, license or _licence_of(base_model), datasets),
        template_path=str(TEMPLATE),
        name=name,
        headline=_headline(found, base_model),
        summary_table=markdown(summary_rows(found)),
        opening_lines="\n".join(opening_lines(directory, name)),
        opened_by=f"Opens with {opened_by(directory)}.\n\n" + markdown(checkpoint_rows(directory)),
        speed=_speed(found, name),
        int8=_int8(found),
        kept=_kept(found),
        made=_made(found),
        recipe=yaml.safe_dump(_recipe(found, base_model), sort_keys=False).strip(),
        limits=_limits(found),
        sources=_sources(found),
        **pictures,
    )
    path = directory / "README.md"
    write_text(path, str(card))
    return path


# --- metadata --------------------------------------------------------------------------------------------------------


def _metadata(found: Evidence, name: str, base_model: str, license: str | None, datasets: list[str] | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    task = _task(found.config)
    data = found.evaluation
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=str(data["dataset"]),
            dataset_name=str(data["dataset"]),
            dataset_split=data.get("split"),
            metric_type=metric,
            metric_name=f"{metric}{label}",
            metric_value=value,
        )
        for metric, (dense, pruned) in found.metrics().items()
        for label, value in ((" (pruned)", pruned), (" (dense, before pruning)", dense))
        if value is not None
    ]
    is_id = base_model.count("/") == 1 and not base_model.startswith((".", "/"))
    return ModelCardData(
        base_model=base_model if is_id else None,
        base_model_relation="finetune" if is_id else None,
        library_name="transformers",
        license=license,
        datasets=datasets or ([data["dataset"]] if str(data.get("dataset", "")).count("/") == 1 else None),
        pipeline_tag=task,
        tags=["pruned", "structured-pruning", "hf_prune"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _task(config: Mapping[str, Any]) -> str | None:
    """The Hub's name of what the model is for."""
    import transformers

    auto = auto_classes(getattr(transformers, config["architectures"][0]), config["model_type"])[0]
    return next((task for task, name in TASKS.items() if name == auto), None)


def _licence_of(base_model: str) -> str | None:
    """From the base model's card: in its directory, or on the Hub; None where there is none in reach."""
    from huggingface_hub import ModelCard

    local = Path(base_model) / "README.md"
    try:
        return ModelCard.load(str(local) if local.is_file() else base_model).data.license
    except Exception:  # no such repository, no network, no metadata: then the card states no licence
        return None


# --- text ------------------------------------------------------------------------------------------------------------


def _headline(found: Evidence, base_model: str) -> str:
    """What was lost and gained, in one sentence."""
    text = f"**{Path(base_model).name or 'The model'} with {found.share('macs_model'):.0%} of its multiply-adds"
    text += f" and {found.share('params_model'):.0%} of its parameters"
    parts = [
        f"{metric} {pruned:.4g}" + (f" (dense {dense:.4g})" if dense is not None else "")
        for metric, (dense, pruned) in found.metrics().items()
    ]
    if found.measured:
        best = max(found.measured[PRUNED]["latency"], key=lambda e: e["speedup"], default=None)
        if best:
            parts.append(f"{best['speedup']:.2f}× as fast at {best['batch']} × {best['length']} tokens")
    return f"{text}: {', '.join(parts)}.**" if parts else f"{text}.** Neither evaluated nor measured yet."


def summary_rows(found: Evidence) -> list[Row]:
    before, after = found.summary["before"], found.summary["after"]
    rows: list[Row] = [
        {"": f"{metric} ({_data(found.evaluation)})"}
        | {DENSE: "–" if dense is None else f"{dense:.4f}", PRUNED: f"{pruned:.4f}"}
        for metric, (dense, pruned) in found.metrics().items()
    ]
    for title, key in (("parameters", "params_model"), ("multiply-adds", "macs_model")):
        left = f"{count(after[key])} ({after[key] / before[key]:.0%})"
        rows.append({"": title, DENSE: count(before[key]), PRUNED: left})
    timed = measured_rows(found.measured) if found.measured else []
    return rows + [row for row in timed if row[""].startswith(("size", "memory", "forward", "decode"))]


def _data(evaluation: Mapping[str, Any]) -> str:
    rows = evaluation["rows"]
    return f"{rows:,} rows of {evaluation['dataset']}" if rows else str(evaluation["dataset"])


def _speed(found: Evidence, name: str) -> str:
    if not found.measured:
        return f"Not measured: `hf-prune bench DENSE {name} --out {name}`, then `hf-prune card {name}`."
    notes = [f"The pruned model is {note}" for note in found.measured[PRUNED]["notes"]]
    return "\n\n".join([markdown(measured_rows(found.measured)), setting_line(found.measured), *notes])


def _int8(found: Evidence) -> str:
    tables = [f"{markdown(corner_rows(engine))}\n\n{corner_line(engine)}" for engine in found.corners]
    return "\n\n".join(tables)


def _kept(found: Evidence) -> str:
    return f"```\n{found.plan.summary()}\n```"


def _made(found: Evidence) -> str:
    cuts = "one cut" if len(found.cuts) < 2 else f"{len(found.cuts)} cuts"
    text = f"By hf_prune {found.summary.get('version', version('hf-prune'))}, in {cuts}"
    if found.cuts:
        seen = found.cuts[-1]["calibration"]
        text += f", each calibrated on {seen['rows']:,} examples ({seen['tokens']:,} tokens)"
    return f"{text}. The exact settings of the last cut; the plan with every kept unit is in `{PLAN_FILE}`:"


def _recipe(found: Evidence, base_model: str) -> dict[str, Any]:
    config = found.cuts[-1]["config"] if found.cuts else dict(found.plan.config)
    return {"base_model": base_model, "pruning": dict(config), "plan": found.plan.hash}


def _limits(found: Evidence) -> str:
    lines = [
        "- Latency is of the machine named above; multiply-adds are arithmetic.",
        "- What the dense model gets wrong, this one does too. Quality was looked at on the data named above alone.",
    ]
    worse = [m for m, (dense, pruned) in found.metrics().items() if dense is not None and _is_worse(m, dense, pruned)]
    if worse:
        lines.append(f"- Lower quality than the dense model in: {', '.join(worse)}.")
    return "\n".join(lines)


def _is_worse(metric: str, dense: float, pruned: float) -> bool:
    return pruned < dense if metric in HIGHER_IS_BETTER else pruned > dense


def _sources(found: Evidence) -> str:
    parts = {
        EVALUATION: f"quality ({found.evaluation.get('command', '')})",
        MEASUREMENTS: "latency, sizes, memory",
        PLAN_FILE: "kept units",
        REPORT_FILE: "scores, settings, repairs",
        CORNERS_FILE: "INT8",
    }
    return "\n".join(f"- `{name}`: {what}" for name, what in parts.items() if (found.directory / name).is_file())


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw(found: Evidence) -> dict[str, str | None]:
    """Draw every picture that the evidence allows; their paths relative to the card. None without matplotlib."""
    drawn: dict[str, str | None] = dict.fromkeys(("kept_units", "scores", "before_after"))
    if importlib.util.find_spec("matplotlib") is None:
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
    return drawn


def _bars(found: Evidence) -> list[tuple[str, float, str]]:
    rows = []
    for metric, (dense, pruned) in found.metrics().items():
        if dense:
            rows.append((metric, pruned / dense, f"{pruned:.4g} of {dense:.4g}"))
    for title, key in (("multiply-adds", "macs_model"), ("parameters", "params_model")):
        rows.append((title, found.share(key), f"{count(found.summary['after'][key])}"))
    for entry in found.measured.get(PRUNED, {}).get("latency", ()):
        what = f"{entry['what']} {entry['batch']} × {entry['length']}"
        rows.append((what, 1 / entry["speedup"], f"{entry['median_ms']:.1f} ms, {entry['speedup']:.2f}×"))
    return rows
