"""The command line: hf-prune demo | inspect | prune | train. Parses, calls the library, prints."""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import typing
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .config import PRESETS, TRAINING_FIELDS, UNIT_CHOICES, PruningConfig
from .data import TASKS

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from .data import Parts
    from .oneshot import Analysis

USER_ERRORS = (ValueError, OSError, ImportError)  # a message, no traceback; FileNotFoundError etc. are OSErrors
DTYPES = ("auto", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 after a user's error, which is one line on standard error."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _quiet_transformers()
            options.run(options)
        except USER_ERRORS as error:
            if options.debug:
                raise
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            return 2
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")


def _quiet_transformers() -> None:
    """Its bars and notes on every load and save are noise between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --- arguments -------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hf-prune", description="Make a transformers checkpoint truly smaller.")
    top.add_argument("--version", action="version", version=version("hf-prune"))
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo_parser(_command(commands, "demo", demo, "A real model cut to half in three shapes, in one table."))
    _model_arguments(_command(commands, "inspect", inspect, "What can be removed from a model, and what opens it."))
    _prune_parser(_command(commands, "prune", prune, "Make a model smaller and save it."))
    _train_parser(_command(commands, "train", train, "Run a training script with the arguments of a recipe."))
    return top


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    return command


def _demo_parser(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("demo_out"), help="Where the models and table.json go.")
    command.add_argument("--cache", type=Path, default=Path(".cache/demo"), help="Keeps the fine-tuned model.")
    command.add_argument("--quick", action="store_true", help="A few rows only: does it run? Its figures mean nothing.")


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="A local directory or a Hub id (token from the environment).")
    command.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    command.add_argument("--task", choices=TASKS, help="Which head to open; default: what config.json names.")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="Default: auto, as saved.")
    command.add_argument("--device-map", help="As in from_pretrained. Default: the GPU if there is one, else the CPU.")
    if command.prog.endswith("inspect"):
        _config_argument(command, "sequence_length")


def _prune_parser(command: argparse.ArgumentParser) -> None:
    _model_arguments(command)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data", required=True, help="A datasets name (or name:configuration), or csv/jsonl/parquet/txt."
    )
    data.add_argument(
        "--text-column", help="Default: a usual name; a `messages` column goes through the chat template."
    )
    data.add_argument("--label-column", help="Default: a usual name. The target text for sequence-to-sequence models.")
    data.add_argument("--split", help="Default: train. Takes datasets' slices, such as train[:10%%].")
    cut = command.add_argument_group("cut")
    cut.add_argument("--preset", choices=PRESETS, help="A published method; other flags change it.")
    for field in fields(PruningConfig):
        if field.name not in TRAINING_FIELDS:
            _config_argument(cut, field.name)
    out = command.add_argument_group("output")
    out.add_argument("--out", type=Path, help="Directory to save to; with several --keep, OUT/keep-0.8 and so on.")
    out.add_argument("--overwrite", action="store_true", help="Replace an output directory that is not empty.")
    out.add_argument("--remote-code", action="store_true", help="Add a file that opens the result without hf_prune.")
    out.add_argument("--model-type", help="Save as another stock family that holds the weights (llama: mistral).")
    out.add_argument("--dry-run", action="store_true", help="Print plan, cost, time and memory; change nothing.")


def _train_parser(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="A YAML file: `script` and its arguments.")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="Change an argument; repeatable.",
    )


def _config_argument(group: Any, name: str) -> None:
    """A flag made from a PruningConfig field; absent from the result unless given, so that presets show through."""
    field = next(field for field in fields(PruningConfig) if field.name == name)
    hint = typing.get_type_hints(PruningConfig)[name]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    options: dict[str, Any] = {"type": kinds[0]}
    literal = next((kind for kind in (hint, *kinds) if typing.get_origin(kind) is Literal), None)
    if literal is not None:
        options = {"choices": typing.get_args(literal)}
    text = field.metadata["help"].replace("%", "%%")
    if name == "keep":
        options, text = {"type": fractions}, f"{text} Several, separated by commas, give one table."
    elif name == "units":
        options, text = {"type": lambda given: given.split(",")}, f"{text} Separated by commas."
    elif field.default is not None:
        text += f" Default: {field.default}."
    flag = f"--{name.replace('_', '-')}"
    group.add_argument(flag, default=argparse.SUPPRESS, metavar=_metavar(name, options), help=text, **options)


def _metavar(name: str, options: Mapping[str, Any]) -> str | None:
    if "choices" in options:
        return None
    return {"keep": "0.5[,0.6,...]", "units": ",".join(UNIT_CHOICES)}.get(name, name.upper())


def fractions(given: str) -> list[float]:
    return [float(part) for part in given.split(",")]


def _config(options: argparse.Namespace, keep: float) -> PruningConfig:
    given = {
        field.name: getattr(options, field.name) for field in fields(PruningConfig) if hasattr(options, field.name)
    }
    given["keep"] = keep
    return PruningConfig.preset(options.preset, **given) if options.preset else PruningConfig(**given)


# --- demo and inspect ------------------------------------------------------------------------------------------------


def demo(options: argparse.Namespace) -> None:
    from .demo.run import QUICK, Settings, run

    run(options.out, options.cache, QUICK if options.quick else Settings())


def train(options: argparse.Namespace) -> None:
    from .recipe import read, run
    from .report.table import console

    metrics = run(read(options.recipe, options.changes))
    for name, value in (metrics or {}).items():
        console().print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", markup=False)


def _open(options: argparse.Namespace) -> PreTrainedModel:
    import torch

    from .data import load_model

    device_map = options.device_map or ("cuda" if torch.cuda.is_available() else None)
    return load_model(
        options.model, options.task, revision=options.revision, dtype=options.dtype, device_map=device_map
    )


def inspect(options: argparse.Namespace) -> None:
    from .anatomy import describe
    from .report.anatomy import anatomy_rows, engine_rows, facts, reachable_rows, stock_note
    from .report.table import console, rich_table

    model = _open(options)
    anatomy = describe(model)
    screen = console()
    length = getattr(options, "sequence_length", PruningConfig.sequence_length)
    for line in facts(model, anatomy, options.model, length):
        screen.print(line, markup=False)
    screen.print(rich_table(anatomy_rows(anatomy, length), title="What can be removed"))
    screen.print(stock_note(anatomy), markup=False)
    least = reachable_rows(anatomy, length, model.device.type)
    screen.print(rich_table(least, title=f"Least share that can remain, at {anatomy.tokens(length)} tokens"))
    screen.print(rich_table(engine_rows(), title="Which engine opens which result"))


# --- prune -----------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """One `hf-prune prune`: what was asked, and what was opened for it."""

    options: argparse.Namespace
    keeps: list[float]
    config: PruningConfig  # with the least of the keeps
    model: PreTrainedModel
    tokenizer: Any
    parts: Parts
    screen: Console

    def directory(self, keep: float) -> Path | None:
        return _directory(self.options.out, keep, self.keeps)


def _directory(out: Path | None, keep: float, keeps: Sequence[float]) -> Path | None:
    return out if out is None or len(keeps) == 1 else out / f"keep-{keep:g}"


def prune(options: argparse.Namespace) -> None:
    keeps = getattr(options, "keep", [PruningConfig.keep])
    configs = [_config(options, keep) for keep in keeps]  # every value is checked before any work
    _refuse_full(options, keeps)
    job = _prepare(options, keeps, min(configs, key=lambda config: config.keep))
    from .oneshot import analyze

    analysis = analyze(job.model, job.parts.calibration, job.config)
    if options.dry_run:
        _dry_run(job, analysis)
        return
    _cut_all(job, analysis)


def _refuse_full(options: argparse.Namespace, keeps: Sequence[float]) -> None:
    """Refuse an output directory that is not empty before any work is done for it."""
    for keep in keeps:
        target = _directory(options.out, keep, keeps)
        if options.overwrite or options.dry_run or target is None or not target.exists():
            continue
        if not target.is_dir() or any(target.iterdir()):
            raise FileExistsError(f"{target} exists and is not empty. Choose another --out, or pass --overwrite.")


def _prepare(options: argparse.Namespace, keeps: list[float], config: PruningConfig) -> Job:
    from transformers import AutoTokenizer

    from .data import Source, load_data
    from .families import family_for
    from .report.table import console

    model = _open(options)
    door = family_for(model.config.model_type).as_model_type
    if options.model_type not in (None, model.config.model_type, door):
        raise ValueError(
            f"--model-type {options.model_type}: {model.config.model_type} weights can be saved as "
            f"{' or '.join(filter(None, (model.config.model_type, door)))}."
        )
    tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    source = Source(options.data, options.text_column, options.label_column, options.split)
    parts = load_data(
        source, model, tokenizer, config.sequence_length, config.calibration_samples, config.calibration_seed
    )
    return Job(options, keeps, config, model, tokenizer, parts, console())


def _dry_run(job: Job, analysis: Analysis) -> None:
    from .report.table import rich_table

    dense = analysis.plan(job.keeps[0]).cost
    before, dense_ms = dense["before"], dense.get("dense_ms")
    rows = [{"model": "dense"} | _costs(before, before) | _latency(dense_ms, dense_ms)]
    for keep in job.keeps:
        plan = analysis.plan(keep)
        job.screen.print(f"keep={keep:g}, {analysis.config.shapes} shapes, {analysis.config.criterion} scores:")
        job.screen.print(plan.summary(), markup=False)
        rows.append(
            {"model": f"keep={keep:g}"}
            | _costs(plan.cost["after"], before)
            | _latency(plan.cost.get("predicted_ms"), dense_ms)
        )
    job.screen.print(rich_table(rows, title=f"Cost at {_length(analysis)} tokens"))
    for line in _estimate(job, analysis):
        job.screen.print(line, markup=False)
    job.screen.print("Dry run: nothing was changed or saved.")


COSTS = {
    "MACs": "macs_model",
    "MACs in blocks": "macs_blocks",
    "parameters": "params_model",
    "parameters in blocks": "params_blocks",
}


def _costs(cost: Mapping[str, float], dense: Mapping[str, float]) -> dict[str, str]:
    from .report.table import count

    return {name: f"{count(cost[key])} ({cost[key] / dense[key]:.0%})" for name, key in COSTS.items()}


def _latency(ms: float | None, dense: float | None) -> dict[str, str]:
    """A column where the target is measured milliseconds."""
    return {"latency": f"{ms:.3g} ms ({ms / dense:.0%})"} if ms and dense else {}


def _length(analysis: Analysis) -> int:
    return analysis.anatomy.tokens(analysis.config.sequence_length)


def _estimate(job: Job, analysis: Analysis) -> list[str]:
    """Time and peak memory of the real run, and how they were estimated."""
    from .report.estimate import REPAIR_PASSES, cut_seconds, peak_bytes

    seconds = cut_seconds(job.model, analysis)
    peak = peak_bytes(job.model, analysis, copies=1 if len(job.keeps) == 1 else 2)
    return [
        f"Time: {analysis.seconds:.0f} s to score (measured just now), then about {seconds:.0f} s to cut and repair "
        f"for each keep ({REPAIR_PASSES[job.config.repair]:g} forward passes over the calibration data, from one timed "
        "batch).",
        f"Peak memory: about {peak / 1e9:.2f} GB (weights + the larger of one scoring batch and the calibration states "
        "with one layer's normal equations; arithmetic, not measured; Python and libraries come on top).",
    ]


def _cut_all(job: Job, analysis: Analysis) -> None:
    """Cut to each keep in turn; one table of all."""
    from .data import evaluate
    from .report.table import rich_table

    metric, value = evaluate(job.model, job.parts.evaluation)
    before = analysis.plan().cost["before"]
    rows = [{"model": "dense", metric: _value(value)} | _costs(before, before)]
    notes: list[str] = []
    for keep in job.keeps:
        # the last cut may use up the model; with one keep there is never a second copy
        model = job.model if keep == job.keeps[-1] else copy.deepcopy(job.model)
        row, lines = _cut_one(job, analysis, keep, model)
        rows.append(row)
        notes += lines
    examples = sum(len(batch["input_ids"]) for batch in job.parts.evaluation)
    title = f"{job.options.model}: {metric} on {examples:,} held-out examples, MACs at {_length(analysis)} tokens"
    job.screen.print(rich_table(rows, title=title))
    for line in notes:
        job.screen.print(line, markup=False, soft_wrap=True)
    if job.options.out is None:
        job.screen.print("Nothing was saved: give --out.")


def _cut_one(job: Job, analysis: Analysis, keep: float, model: PreTrainedModel) -> tuple[dict[str, str], list[str]]:
    from .data import evaluate
    from .oneshot import apply

    started = time.perf_counter()
    result = apply(model, analysis, analysis.plan(keep))
    seconds = time.perf_counter() - started
    metric, value = evaluate(model, job.parts.evaluation)
    row = {"model": f"keep={keep:g}", metric: _value(value)} | _costs(result.report["after"], result.report["before"])
    latency = result.report.get("latency", {})
    row |= _latency(latency.get("realised_ms"), latency.get("dense_ms"))
    row["cut and repair"] = f"{seconds:.0f} s"
    lines = _other_shapes(keep, result.report)
    return row, lines + _save(job, model, job.directory(keep))


def _value(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _other_shapes(keep: float, report: Mapping[str, Any]) -> list[str]:
    others = [f"{shapes} {cost['predicted_loss']:.3g}" for shapes, cost in report["other_shapes"].items()]
    if not others:
        return []
    return [f"keep={keep:g}: score removed {report['predicted_loss']:.3g}; in other shapes: {', '.join(others)}."]


def _save(job: Job, model: PreTrainedModel, directory: Path | None) -> list[str]:
    """Save one result; the lines that open it."""
    from .checkpoint import save_pretrained
    from .report.engines import opened_by, opening_lines

    if directory is None:
        return []
    options = job.options
    difference = save_pretrained(
        model,
        directory,
        processing_class=job.tokenizer,
        overwrite=options.overwrite,
        remote_code=options.remote_code,
        model_type=options.model_type,
    )
    return [
        f"\n# {directory}: saved and proven to reload (outputs differ by {difference:.0e}); opens with "
        f"{opened_by(directory)}:",
        *opening_lines(directory),
    ]
