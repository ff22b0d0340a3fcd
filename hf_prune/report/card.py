"""The model card of a pruned checkpoint, with its pictures: rendered from the JSON files in its directory alone."""

from __future__ import annotations

import html
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.history import PLAN_FILE, REPORT_FILE, is_of
from ..checkpoint.layout import KEY
from ..checkpoint.proof import PROOF_FILE, checkpoint, weights_id
from ..files import read_json, write_text
from ..plan import PruningPlan
from . import plots
from .corners import CORNERS_FILE, corner_line, corner_rows
from .engines import checkpoint_rows, config_of, opened_by, opening_lines, task_of
from .render import MEASUREMENTS, measured_rows, setting_line
from .table import Row, count, markdown

TEMPLATE = Path(__file__).with_name("card.md.jinja")
EVALUATION = "evaluation.json"
PICTURES = "pictures"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
DENSE, PRUNED = "dense", "pruned"
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "rmse", "mae", "wer", "cer")  # in a metric's name
LOOK_UP = 5.0  # seconds for the base model's card on the Hub


@dataclass(frozen=True)
class Evidence:
    """What the files beside the weights say. One that is missing, or of other weights, leaves its part out."""

    directory: Path

    def _json(self, name: str) -> Any:
        path = self.directory / name
        return read_json(path) if path.is_file() else {}

    def _of_these_weights(self, name: str) -> Any:
        found = self._json(name)
        return found if found.get("weights") == weights_id(self.directory) else {}

    @property
    def there(self) -> list[str]:
        """The files that hold the evidence."""
        names = ("config.json", PLAN_FILE, REPORT_FILE, PROOF_FILE, EVALUATION, MEASUREMENTS, CORNERS_FILE)
        return [name for name in names if (self.directory / name).is_file()]

    def check(self) -> None:
        """Raise ValueError for a file that is no JSON, or of another model than config.json; the message names it."""
        for name in self.there:
            self._json(name)
        weights_id(self.directory)
        named = self.summary.get("plan", self.plan.hash)
        if not is_of(self.plan, named, self.config["model_type"]):
            raise ValueError(
                f"{self.directory / PLAN_FILE} is the plan {self.plan.hash[:12]} of a {line(self.plan.model_type)}; "
                f"config.json is of a {self.config['model_type']} cut by {line(named)[:12]}. Restore it, or save again."
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        return config_of(self.directory)

    @cached_property
    def plan(self) -> PruningPlan:
        return PruningPlan.load(self.directory / PLAN_FILE)

    @cached_property
    def cuts(self) -> list[dict[str, Any]]:
        return list(self._json(REPORT_FILE).get("cuts", ()))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """{"dataset", "split", "rows", "command", "results": {"dense": {metric: value}, "pruned": {...}}}"""
        return self._of_these_weights(EVALUATION)

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """What `hf-prune bench DENSE DIRECTORY --out DIRECTORY` found of the first model and of this one."""
        first, *others = self._json(MEASUREMENTS).values() or ({},)
        ours = [found for found in others if found["weights"] and found["weights"] == weights_id(self.directory)]
        return {DENSE: first, PRUNED: ours[0]} if ours else {}

    @cached_property
    def corners(self) -> list[dict[str, Any]]:
        """What `corners.corners` found, by engine."""
        return list(self._of_these_weights(CORNERS_FILE).get("engines", ()))

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the config says of the pruning; nothing where all was kept."""
        return self.config[KEY]

    @property
    def origin(self) -> str:
        """The Hub id of what was pruned, or the name of its directory; "" where that is not known."""
        return str(self.summary.get("base_model") or "")

    @property
    def base_model(self) -> str:
        """The Hub id of what was pruned; "" where it was a directory."""
        return self.origin if HUB_ID.fullmatch(self.origin) else ""

    def cost(self, key: str) -> tuple[float, float]:
        """(dense, pruned); key as in `costs.report`: macs_model, params_blocks, ..."""
        said = self.summary or self.plan.cost
        return said["before"][key], said["after"][key]

    def share(self, key: str) -> float:
        before, after = self.cost(key)
        return after / before

    def metrics(self) -> dict[str, tuple[float | None, float]]:
        """name -> (dense, pruned)"""
        results = self.evaluation.get("results", {})
        return {name: (results.get(DENSE, {}).get(name), value) for name, value in results.get(PRUNED, {}).items()}


def write_evaluation(
    directory: Path, results: Mapping[str, Any], *, dataset: str, split: str, rows: int | None, command: str
) -> None:
    """evaluation.json. results: {"dense": {metric: value}, "pruned": {...}}; the dense ones may be missing."""
    found = {"dataset": dataset, "split": split, "rows": rows, "command": command, "results": results}
    write_text(directory / EVALUATION, json.dumps({"weights": weights_id(directory), **found}, indent=1) + "\n")


def write_card(
    directory: str | os.PathLike[str],
    *,
    name: str | None = None,
    base_model: str | None = None,
    note: str | None = None,
    **metadata: Any,
) -> Path:
    """README.md and its pictures, beside the weights. Every number in them is read from a JSON file there.

    Args:
        name: what opens it, a Hub id or a path; default: the directory's name.
        base_model: Hub id; default: what the model was loaded from, where that is one.
        note: a sentence for the card's limits.
        metadata: fields of huggingface_hub's ModelCardData (license, datasets, language, ...) in place of what is found
            here and on the base model's card; `tags` are added.

    Raises:
        ValueError: no directory that hf_prune saved, or files in it that were edited. TypeError: a name is no word.
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


# --- strings from elsewhere ------------------------------------------------------------------------------------------


def line(text: Any) -> str:
    """In one line, of characters that a file can hold."""
    return " ".join(str(text).encode(errors="replace").decode().split())


def quoted(text: Any) -> str:
    """As words of Markdown: no HTML, no link, no code, no end of a table's cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(line(text), quote=False))


def code(text: Any) -> str:
    """In one line of code."""
    return f"`{line(text).replace('`', chr(39))}`"


def fenced(text: str, language: str = "") -> str:
    """A block that nothing in it can end."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


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
    """From the base model's card on the Hub; {} where there is none in reach."""
    from huggingface_hub import HfApi

    try:
        data: Any = HfApi().model_info(base_model, timeout=LOOK_UP).card_data or {}
        return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    except Exception:  # no such repository, no network, no metadata: then the card states no licence
        return {}


# --- text ------------------------------------------------------------------------------------------------------------


def _headline(found: Evidence, base_model: str) -> str:
    """What was lost and gained, in one sentence."""
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
    rows: list[Row] = [
        {"": f"{quoted(metric)} ({_data(found.evaluation)})"}
        | {DENSE: "–" if dense is None else f"{dense:.4f}", PRUNED: f"{pruned:.4f}"}
        for metric, (dense, pruned) in found.metrics().items()
    ]
    for title, key in (("parameters", "params_model"), ("multiply-adds", "macs_model")):
        before, after = found.cost(key)
        rows.append({"": title, DENSE: count(before), PRUNED: f"{count(after)} ({after / before:.0%})"})
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
    """Of names and figures from a file."""
    return markdown([{quoted(name): quoted(cell) for name, cell in row.items()} for row in rows])


def _int8(found: Evidence) -> str:
    tables = [f"{_table(corner_rows(engine))}\n\n{quoted(corner_line(engine))}" for engine in found.corners]
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
        CORNERS_FILE: "INT8",
    }
    used = {EVALUATION: found.evaluation, MEASUREMENTS: found.measured, CORNERS_FILE: found.corners}
    there = [name for name in parts if used.get(name, (found.directory / name).is_file())]
    return "\n".join(f"- `{name}`: {parts[name]}" for name in there)


# --- pictures --------------------------------------------------------------------------------------------------------


def _draw(found: Evidence) -> dict[str, str | None]:
    """Draw every picture that the evidence allows; their paths relative to the card. None without matplotlib."""
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
    """The first metric against the first latency: of the four corners where they were measured, else of the two."""
    models, engine = {}, "torch"
    if found.corners:
        models, engine = found.corners[0]["models"], found.corners[0]["engine"]
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
