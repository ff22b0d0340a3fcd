"""Make a model smaller and save it."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, TRAINING_FIELDS, PruningConfig
from .common import config_argument, device_of, directory, model_arguments, open_model, path, tokenizer_argument

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..data.texts import Parts
    from ..oneshot import Analysis, PruneResult


RESULT = "keep-{}"  # the directory in OUT of each of several results


def arguments(command: argparse.ArgumentParser) -> None:
    model_arguments(command)
    tokenizer_argument(command)
    data = command.add_argument_group("data")
    data.add_argument(
        "--data", required=True, help="A datasets name (or name:configuration), or csv/jsonl/parquet/txt."
    )
    data.add_argument(
        "--text-column", help="Default: a usual name; a `messages` column goes through the chat template."
    )
    data.add_argument("--label-column", help="Default: a usual name. The target text for sequence-to-sequence models.")
    data.add_argument(
        "--vocabulary",
        type=path,
        help="Texts whose tokens stay, with tokens among the --units. Default: those of --data.",
    )
    data.add_argument("--split", help="Default: train. Takes datasets' slices, such as train[:10%%].")
    cut = command.add_argument_group("cut")
    cut.add_argument("--preset", choices=PRESETS, help="A published method; other flags change it.")
    for field in fields(PruningConfig):
        if field.name not in TRAINING_FIELDS:
            config_argument(cut, field.name)
    out = command.add_argument_group("output")
    out.add_argument("--out", type=directory, help="Directory to save to; with several --keep, OUT/keep-0.8 and so on.")
    out.add_argument("--overwrite", action="store_true", help="Replace an output directory that is not empty.")
    out.add_argument("--remote-code", action="store_true", help="Add a file that opens the result without hf_prune.")
    out.add_argument("--model-type", help="Save as another stock family that holds the weights (llama: mistral).")
    out.add_argument(
        "--stream",
        action="store_true",
        help="From file to file, never whole in memory: for checkpoints larger than it.",
    )
    out.add_argument("--dry-run", action="store_true", help="Print plan, cost, time and memory; change nothing.")


def pruning_config(options: argparse.Namespace, keep: float) -> PruningConfig:
    given = {
        field.name: getattr(options, field.name) for field in fields(PruningConfig) if hasattr(options, field.name)
    }
    given["keep"] = keep
    return PruningConfig.preset(options.preset, **given) if options.preset else PruningConfig(**given)


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
        return None if self.options.out is None else _directory(self.options.out, keep, self.keeps)


def _directory(out: Path, keep: float, keeps: Sequence[float]) -> Path:
    return out if len(keeps) == 1 else out / RESULT.format(f"{keep:g}")


def run(options: argparse.Namespace) -> None:
    keeps = getattr(options, "keep", [PruningConfig.keep])
    configs = [pruning_config(options, keep) for keep in keeps]  # every value is checked before any work
    _refuse_full(options, keeps)
    if options.stream:
        _stream(options, configs)
        return
    job = _prepare(options, keeps, min(configs, key=lambda config: config.keep))
    from ..oneshot import analyze

    analysis = analyze(
        job.model,
        job.parts.calibration,
        job.config,
        processing_class=job.tokenizer,
        vocabulary=_vocabulary(job),
    )
    if options.dry_run:
        _dry_run(job, analysis)
        return
    _cut_all(job, analysis)


NOT_STREAMED = {  # with --stream: what is refused, and what to do instead
    "dry_run": "--dry-run opens the model to plan",
    "model_type": "--model-type puts all weights into another class",
}


def _stream(options: argparse.Namespace, configs: Sequence[PruningConfig]) -> None:
    """Prune without a model in memory; the text is prepared for one without weights."""
    from ..model.anatomy import describe
    from ..report.table import rich_table
    from ..streaming import checked_shards, prune_checkpoint

    _check_streamed(options, configs)
    started, device = time.perf_counter(), device_of(options) or "cpu"
    checked_shards(options.model, options.revision, options.out)
    without = argparse.Namespace(**{**vars(options), "device_map": "meta"})
    job = _prepare(without, [configs[0].keep], configs[0])
    result = prune_checkpoint(
        options.model,
        job.parts.calibration,
        configs[0],
        out=options.out,
        processing_class=job.tokenizer,
        vocabulary=_vocabulary(job),
        task=options.task,
        revision=options.revision,
        dtype=options.dtype,
        device=device,
        overwrite=options.overwrite,
        remote_code=options.remote_code,
    )
    before, after = result.report["before"], result.report["after"]
    rows = [{"model": "dense"} | _costs(before, before), {"model": f"keep={job.keeps[0]:g}"} | _costs(after, before)]
    rows[1]["all of it"] = f"{time.perf_counter() - started:.0f} s"
    job.screen.print(
        rich_table(
            rows, title=f"{options.model}, MACs at {describe(result.model).tokens(job.config.sequence_length)} tokens"
        )
    )
    for line in [*_other_shapes(job.keeps[0], result.report), *_saved(options.out, result.report["difference"])]:
        job.screen.print(line, markup=False, soft_wrap=True)


def _check_streamed(options: argparse.Namespace, configs: Sequence[PruningConfig]) -> None:
    """Raise ValueError for what cannot be done from file to file."""
    refused = next((why for name, why in NOT_STREAMED.items() if getattr(options, name)), None)
    if refused is not None:
        raise ValueError(f"{refused}, and with --stream it is never whole in memory. Leave one of them out.")
    if options.out is None or len(configs) > 1:
        raise ValueError(
            "--stream writes one checkpoint from the files of another: give --out, and one --keep at a time."
        )


def _refuse_full(options: argparse.Namespace, keeps: Sequence[float]) -> None:
    """Refuse an output directory that is not empty before any work is done for it; others' results may lie in OUT."""
    from ..checkpoint.directory import refuse_full

    if options.out is None:
        return
    allowed = options.overwrite or options.dry_run
    for keep in keeps:
        refuse_full(_directory(options.out, keep, keeps), allowed)
    strangers = [path.name for path in sorted(options.out.glob("*")) if not path.match(RESULT.format("*"))]
    if len(keeps) > 1 and strangers and not allowed:
        raise FileExistsError(
            f"{options.out} holds more than results ({strangers[0]}). Choose another directory, or write beside "
            "them (--overwrite)."
        )


def _prepare(options: argparse.Namespace, keeps: list[float], config: PruningConfig) -> Job:
    from ..data.opening import load_tokenizer
    from ..data.texts import Source, check_reads_text, load_data
    from ..model.lookup import family_of
    from ..report.table import console

    model = open_model(options)
    door = family_of(model).as_model_type
    if options.model_type not in (None, model.config.model_type, door):
        raise ValueError(
            f"--model-type {options.model_type}: {model.config.model_type} weights can be saved as "
            f"{' or '.join(filter(None, (model.config.model_type, door)))}."
        )
    check_reads_text(model)
    own = options.tokenizer is None
    tokenizer = load_tokenizer(options.model if own else options.tokenizer, options.revision if own else None)
    source = Source(options.data, options.text_column, options.label_column, options.split)
    parts = load_data(
        source, model, tokenizer, config.sequence_length, config.calibration_samples, config.calibration_seed
    )
    return Job(options, keeps, config, model, tokenizer, parts, console())


def _vocabulary(job: Job) -> Any:
    """Texts whose tokens stay, where tokens are among the units."""
    return job.options.vocabulary or (job.parts.texts() if "tokens" in (job.config.units or ()) else None)


def _dry_run(job: Job, analysis: Analysis) -> None:
    from ..report.table import rich_table

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
    from ..report.table import count

    return {name: f"{count(cost[key])} ({cost[key] / dense[key]:.0%})" for name, key in COSTS.items()}


def _latency(ms: float | None, dense: float | None) -> dict[str, str]:
    """A column where the target is measured milliseconds."""
    return {"latency": f"{ms:.3g} ms ({ms / dense:.0%})"} if ms and dense else {}


def _length(analysis: Analysis) -> int:
    return analysis.anatomy.tokens(analysis.config.sequence_length)


def _estimate(job: Job, analysis: Analysis) -> list[str]:
    """Time and peak memory of the real run, and how they were estimated."""
    from ..report.estimate import REPAIR_PASSES, cut_seconds, peak_bytes

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
    from ..data.evaluation import evaluate
    from ..report.table import rich_table

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
    from ..data.evaluation import evaluate

    started = time.perf_counter()
    result = analysis.cut_(model, keep)
    seconds = time.perf_counter() - started
    metric, value = evaluate(model, _in_tokens_of(job, model, result))
    row = {"model": f"keep={keep:g}", metric: _value(value)} | _costs(result.report["after"], result.report["before"])
    latency = result.report.get("latency", {})
    row |= _latency(latency.get("realised_ms"), latency.get("dense_ms"))
    row["cut and repair"] = f"{seconds:.0f} s"
    lines = _other_shapes(keep, result.report)
    return row, lines + _save(job, result, job.directory(keep))


def _in_tokens_of(job: Job, model: PreTrainedModel, result: PruneResult) -> list[dict[str, Any]]:
    """The rows to evaluate on, in the tokens that a model has after its cut."""
    import torch

    from ..model.batches import prepare
    from ..vocabulary.choice import translation

    if result.processing_class is job.tokenizer:
        return job.parts.evaluation
    translate = translation(job.tokenizer, result.processing_class, model)
    prepared = (prepare(model, batch, torch.zeros(len(batch["input_ids"]))) for batch in job.parts.evaluation)
    return [{**batch.inputs, **batch.targets} for batch in map(translate, prepared)]


def _value(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4g}"


def _other_shapes(keep: float, report: Mapping[str, Any]) -> list[str]:
    others = [f"{shapes} {cost['predicted_loss']:.3g}" for shapes, cost in report["other_shapes"].items()]
    if not others:
        return []
    return [f"keep={keep:g}: score removed {report['predicted_loss']:.3g}; in other shapes: {', '.join(others)}."]


def _save(job: Job, result: PruneResult, directory: Path | None) -> list[str]:
    """Save one result; the lines that open it."""
    from ..checkpoint.save import save_pretrained

    if directory is None:
        return []
    options = job.options
    difference = save_pretrained(
        result.model,
        directory,
        processing_class=result.processing_class,
        overwrite=options.overwrite,
        remote_code=options.remote_code,
        model_type=options.model_type,
    )
    return _saved(directory, difference)


def _saved(directory: Path, difference: float) -> list[str]:
    from ..report.engines import opened_by, opening_lines

    return [
        f"\n# {directory}: saved and proven to reload (outputs differ by {difference:.0e}); opens with "
        f"{opened_by(directory)}:",
        *opening_lines(directory),
    ]
