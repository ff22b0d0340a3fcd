"""prune(): score, decide, then cut and repair layer by layer. The order of calls; the maths lives elsewhere.

Shapes: B examples, T tokens, n tokens of a batch, K input columns of a consumer, D hidden width.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard
from torch import nn

from .model import layerwise
from .decide.allocate import SHAPES, allocate, choose_units, default_align, reachable, unit_of, warn_if_far_below
from .model.anatomy import Anatomy, describe, quiet
from .model.batches import GUARD, Batch, draw, forward_inputs, token_mask
from .score.statistics import ALONE, Ranks, statistics
from .checkpoint.history import PROOF_ROWS, Record, pack, record_of
from .checkpoint.layout import KEY, configs_of, write_
from .score.checks import check_inputs, fit_labels
from .config import PruningConfig, config_or
from .decide.costs import dense_counts, planned_counts
from .decide.costs import report as cost_report
from .score.criteria import CRITERIA, Criterion, SiteStatistics
from .decide.latency import LatencyTable, Watch, latency_table
from .score.losses import has_head, has_loss, predicts_tokens
from .plan import PruningPlan, SiteKey, must_be_plan
from .repair.walk import StackRepair
from .model.sites import Site
from .model.cut import cut_, kept_columns
from .model.undo import undone_on_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTILES = 33  # of the scores of a site, in its report


@dataclass
class PruneResult:
    """The pruned model (the one handed in), the plan relative to it as it was handed in, scores, and a report."""

    model: PreTrainedModel
    plan: PruningPlan
    scores: dict[SiteKey, torch.Tensor]
    report: dict[str, Any]


@dataclass
class Analysis:
    """One statistics pass: scores from which plans for any `keep` follow without running the model again."""

    anatomy: Anatomy
    config: PruningConfig  # with the criterion filled in
    batches: list[Batch]
    align: int
    scores: dict[SiteKey, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    gates: dict[SiteKey, torch.Tensor] = field(default_factory=dict)  # of each example, where the criterion uses them
    tokens: dict[SiteKey, list[torch.Tensor]] = field(default_factory=dict)  # squared gradients, see repair.py
    table: LatencyTable | None = None  # measured, for metric "latency"

    def plan(self, keep: float | None = None) -> PruningPlan:
        """The plan for a `keep` (default: the config's).

        Raises:
            ValueError: not reachable with these units and shapes.
        """
        config = self.config if keep is None else replace(self.config, keep=keep)
        across = CRITERIA[str(config.criterion)].across
        return allocate(self.anatomy, self.scores, config, self.align, across, self.gates, self.table)

    def cut_(
        self, model: PreTrainedModel, keep: float | None = None, *, plan: PruningPlan | None = None
    ) -> PruneResult:
        """Cut and repair the model that was analysed, or a copy of it, in place; nothing is scored again.

        Args:
            keep: the target; default: the config's.
            plan: cut by this plan instead.

        Raises:
            ValueError: not reachable, or a plan for another model; then nothing has changed.
        """
        if plan is None:
            plan = self.plan(keep)
            warn_if_far_below(plan.cost["keep"], self.config if keep is None else replace(self.config, keep=keep))
        must_be_plan(plan)
        _check_plan(describe(model), plan)
        return apply(model, self, plan)


def analyze(
    model: PreTrainedModel,
    data: Any,
    config: PruningConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    guard: Any = None,
    ranks: Ranks = ALONE,
) -> Analysis:
    """Score every unit of a model on calibration data; nothing is changed.

    Args:
        ranks: processes that share the scoring, where all of them call this with the same model, data and config.

    Raises:
        ValueError: see `prune`.
    """
    started = time.perf_counter()
    config = config_or(config)
    anatomy = describe(model)
    align = config.align or default_align(anatomy, model.device.type)
    _check_repair(anatomy, config)
    table = latency_table(model, anatomy, config, align) if config.metric == "latency" else None
    _check_reachable(anatomy, config, align, table)
    batches = _draw(model, data, config, processing_class, data_collator, guard)
    config = replace(config, criterion=_criterion(model, batches, config))
    analysis = Analysis(anatomy, config, batches, align, table=table)
    _score_(model, analysis, ranks=ranks)
    analysis.seconds = time.perf_counter() - started
    return analysis


def _score_(model: PreTrainedModel, analysis: Analysis, only_tokens: bool = False, ranks: Ranks = ALONE) -> None:
    """Run the statistics pass, and fill in what it found; `only_tokens`: just what the repair weighs tokens by."""
    anatomy, config = analysis.anatomy, analysis.config
    criterion = CRITERIA[str(config.criterion)]
    units = choose_units(anatomy, config)
    sizes = {site.key: site.sizes[unit_of(site, units)] for site in anatomy.sites}
    scored = _scored(analysis.batches)
    wanted = replace(criterion, needs=("gradients",)) if only_tokens else criterion
    for site, found in statistics(model, anatomy.sites, sizes, scored, wanted, config.calibration_seed, ranks):
        if found.tokens is not None:
            analysis.tokens[site.key] = found.tokens
        if not only_tokens:
            analysis.scores[site.key] = _score(site, criterion, found, model.dtype)
        if found.gate is not None:
            analysis.gates[site.key] = found.gate
    _check_scores(analysis)


def _check_scores(analysis: Analysis) -> None:
    """Raise ValueError where no site's scores tell one unit from another."""
    several = [score for score in analysis.scores.values() if len(score) > 1]
    if several and all(bool((score == score[0]).all()) for score in several):
        raise ValueError(
            f"All {analysis.config.criterion} scores are equal ({float(several[0][0]):.3g}): they tell no unit from "
            "another. Check that the model is trained and that labels and tokens are real, or use another criterion."
        )


def _draw(model: Any, data: Any, config: PruningConfig, processing_class: Any, data_collator: Any, guard: Any) -> Any:
    samples, seed = config.calibration_samples, config.calibration_seed
    batches = draw(model, data, samples, seed, processing_class, data_collator, guard=guard)
    check_inputs(model, batches)
    return batches


def _scored(batches: Sequence[Batch]) -> list[Batch]:
    """All but those of another source, which only guard."""
    return [batch for batch in batches if (batch.held_out < GUARD).all()]


def _score(site: Site, criterion: Criterion, found: SiteStatistics, dtype: torch.dtype) -> torch.Tensor:
    tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    if all(bool(value.isfinite().all()) for value in tensors):
        score = criterion.score(found)
        if torch.isfinite(score).all():
            return score
    raise ValueError(
        f"{site.name}: the statistics or the {criterion.name} score are NaN or infinite. Check the weights, the "
        f"calibration data and the dtype ({dtype}); float16 overflows where bfloat16 or float32 do not."
    )


def prune(
    model: PreTrainedModel,
    data: Any,
    config: PruningConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    plan: PruningPlan | None = None,
    guard: Any = None,
) -> PruneResult:
    """Make a model smaller in place: score, decide, cut and repair; its config then says the new sizes.

    Args:
        data: list or iterable of batches (dicts of tensors for `model(**batch)`), a DataLoader, or a datasets.Dataset
            with `processing_class` or `data_collator`.
        plan: replay this plan instead of deciding one (it is checked against the model); `config` defaults to the one
            that it was made with. Where the repair weighs tokens by their gradients, those are computed; to cut to
            several targets after one pass, see `Analysis.cut_`.
        guard: data of another source than `data`, in the same forms: a repair is refused where it makes the error on
            them larger. Nothing is scored or fitted on them. For language models, text unlike the calibration text.

    Raises:
        ValueError: unknown family; quantised, meta or sharded weights; no loss for a gradient criterion; fewer than 8
            examples; `keep` not reachable; `repair="bias"` without biases; NaN in the scores; a plan for another
            model. All before anything is changed; and what is stopped later, by an error or an interrupt, leaves the
            model as it was.
    """
    if plan is None:
        analysis = analyze(
            model, data, config, processing_class=processing_class, data_collator=data_collator, guard=guard
        )
        return analysis.cut_(model)
    must_be_plan(plan)
    config = config_or(config, lambda: PruningConfig.from_dict(plan.config))
    anatomy = describe(model)
    _check_plan(anatomy, plan)
    _check_repair(anatomy, config)
    batches = _draw(model, data, config, processing_class, data_collator, guard)
    analysis = Analysis(anatomy, config, batches, config.align or 1)
    by_loss = config.criterion is not None and CRITERIA[config.criterion].needs_loss
    if config.repair == "least_squares" and by_loss and has_loss(model, batches):
        fit_labels(model, _scored(batches))
        _score_(model, analysis, only_tokens=True)
    return apply(model, analysis, plan)


def apply(model: PreTrainedModel, analysis: Analysis, plan: PruningPlan | None = None) -> PruneResult:
    """Cut and repair a model by a plan (default: the analysis' own for its config). In place, all of it or nothing."""
    plan = plan or analysis.plan()
    anatomy, config = analysis.anatomy, analysis.config
    _check_plan(anatomy, plan)
    earlier = record_of(model)
    composed = plan if earlier is None else _composed(earlier.plan, plan)
    timed = plan.config.get("metric") == "latency"
    watch = Watch.start(model, anatomy, PruningConfig.from_dict(plan.config)) if timed else None
    report = _report(analysis, plan)
    layers = {site.path: model.get_submodule(site.path) for site in anatomy.sites}
    modules = [model, *(module for layer in layers.values() for module in layer.modules())]
    with quiet(model), undone_on_error(modules, configs_of(model)):
        started = time.perf_counter()
        if not plan.is_identity:
            report["repairs"] = _cut_and_repair_(model, analysis, plan)
            write_(model, _summary(model, report, composed, config))
        report["seconds"]["cut_and_repair"] = time.perf_counter() - started
        if watch is not None:
            report["latency"] = watch.stop(model, plan) | {"table": analysis.table.source if analysis.table else None}
        cuts = (*(earlier.cuts if earlier else ()), report)
        model._hf_prune = Record(composed, _proof_rows(analysis.batches) if analysis.batches else None, cuts)  # type: ignore[assignment]
    return PruneResult(model, plan, analysis.scores, report)


def _composed(earlier: PruningPlan, plan: PruningPlan) -> PruningPlan:
    try:
        return earlier.compose(plan)
    except ValueError as error:
        raise ValueError(
            f"The model's sizes are not those that its earlier plan ({earlier.hash[:12]}) left: {error} Load the model "
            "from what was saved."
        ) from error


def _report(analysis: Analysis, plan: PruningPlan) -> dict[str, Any]:
    """What is known of a cut before it is made. The costs are counted anew: a plan may have been edited."""
    anatomy, length = analysis.anatomy, analysis.config.sequence_length
    before = cost_report(anatomy, dense_counts(anatomy), length)
    after = cost_report(anatomy, planned_counts(anatomy, plan), length)
    counted = f"{plan.cost.get('metric')}_{plan.cost.get('scope')}"  # a latency is not
    return {
        **plan.cost,
        **({"keep": after[counted] / before[counted]} if counted in after else {}),
        "before": before,
        "after": after,
        "config": dict(plan.config),
        "criterion": analysis.config.criterion,
        "calibration": {
            "rows": sum(batch.size for batch in analysis.batches),
            "tokens": sum(batch.tokens for batch in analysis.batches),
        },
        "scores": _quantiles(analysis.scores),
        "repairs": [],
        "other_shapes": _other_shapes(analysis, plan),
        "seconds": {"score": analysis.seconds},
    }


# --- checks before anything is changed -------------------------------------------------------------------------------


def _check_plan(anatomy: Anatomy, plan: PruningPlan) -> None:
    must_be_plan(plan)
    plan.check(anatomy.model_type, anatomy.sizes)
    for site in anatomy.sites:
        kept_columns(site, plan[site.key].unit, plan[site.key].kept)  # raises for heads unevenly over their groups
    kept: dict[tuple[str, str], tuple[int, ...]] = {}
    for site in anatomy.sites if anatomy.family.coupled_heads else ():
        if site.is_attention and kept.setdefault((site.stack, site.kind), plan[site.key].kept) != plan[site.key].kept:
            raise ValueError(
                f"{site.name}: all {site.kind} sites of a {anatomy.model_type} {site.stack} must keep the same heads "
                f"(they share one position bias); the plan keeps {plan[site.key].kept} here."
            )


def _check_repair(anatomy: Anatomy, config: PruningConfig) -> None:
    without = [site.name for site in anatomy.sites if not site.has_bias]
    if config.repair == "bias" and without:
        raise ValueError(
            f"repair='bias' needs a bias on every consumer; {len(without)} have none in a stock {anatomy.model_type} "
            f"(first: {without[0]}), and one is never created. Use repair='least_squares' or 'none'."
        )


def _check_reachable(anatomy: Anatomy, config: PruningConfig, align: int, table: LatencyTable | None) -> None:
    if config.keep < 1 and reachable(anatomy, config, align, table) > config.keep:
        flat = {
            site.key: torch.ones(site.sizes[unit_of(site, choose_units(anatomy, config))]) for site in anatomy.sites
        }
        allocate(anatomy, flat, config, align, measured=table)  # raises, and says what can be reached


def _criterion(model: PreTrainedModel, batches: Sequence[Batch], config: PruningConfig) -> Any:
    """The criterion asked for, or the one for this model and data; labels fitted where it reads them."""
    batches, asked = _scored(batches), config.criterion
    loss = has_loss(model, batches)
    if asked is not None and CRITERIA[asked].needs_loss and not loss:
        raise ValueError(
            f"criterion={asked!r} needs a loss, and {type(model).__name__} with targets "
            f"{sorted(batches[0].targets)} has none. Give labels and a model with a head, or use criterion='hessian' "
            "(or None, which picks it)."
        )
    if loss and (asked is None or CRITERIA[asked].needs_loss):
        fit_labels(model, batches)
    if asked is not None:
        return asked
    if loss:
        return "fisher_obs_root" if any(predicts_tokens(model, batch) for batch in batches) else "fisher_obs"
    if has_head(model):
        warnings.warn(
            f"No labels: what {type(model).__name__} predicts is not looked at, units are scored by 'hessian'. Give "
            "labels, or criterion='hessian' if that is meant.",
            stacklevel=4,
        )
    return "hessian"


# --- cut and repair --------------------------------------------------------------------------------------------------


def _cut_and_repair_(model: PreTrainedModel, analysis: Analysis, plan: PruningPlan) -> list[dict[str, Any]]:
    anatomy, batches, method = analysis.anatomy, analysis.batches, analysis.config.repair
    if method == "none":
        for site in anatomy.sites:
            if not plan[site.key].is_identity:
                cut_(model.get_submodule(site.path), site, plan[site.key].unit, plan[site.key].kept)
        return []
    reports: list[dict[str, Any]] = []
    inputs = [forward_inputs(model, batch) for batch in batches]
    stacks = list(dict.fromkeys(site.stack for site in anatomy.sites))
    with quiet(model), torch.no_grad():
        dense = {stack: layerwise.capture(model, _layers(model, anatomy, stack), inputs) for stack in stacks}
        for stack in stacks:
            layers = _layers(model, anatomy, stack)
            # a later stack also reads what the stacks before it, cut by now, give
            pruned = dense[stack].copy() if stack == stacks[0] else layerwise.capture(model, layers, inputs)
            masks = [token_mask(model, batch, stack) for batch in batches]
            held_out = [batch.held_out for batch in batches]
            offset = anatomy.family.norm_offset
            work = StackRepair(plan, method, dense.pop(stack), pruned, masks, held_out, offset, analysis.tokens)
            reports += work.run_(layers, _by_layer(anatomy, stack))
    return reports


def _layers(model: nn.Module, anatomy: Anatomy, stack: str) -> list[nn.Module]:
    return [model.get_submodule(sites[0].path) for sites in _by_layer(anatomy, stack)]


def _by_layer(anatomy: Anatomy, stack: str) -> list[list[Site]]:
    layers: dict[int, list[Site]] = {}
    for site in anatomy.sites:
        if site.stack == stack:
            layers.setdefault(site.layer, []).append(site)
    return list(layers.values())


# --- what is remembered and reported ---------------------------------------------------------------------------------


def _summary(
    model: PreTrainedModel, report: Mapping[str, Any], composed: PruningPlan, config: PruningConfig
) -> dict[str, Any]:
    previous = model.config.__dict__.get(KEY, {})
    origin = {key: previous[key] for key in ("base_model", "license") if previous.get(key)}
    return {
        "version": version("hf-prune"),
        **(origin or _origin(str(model.config._name_or_path))),
        "criterion": config.criterion,
        "repair": config.repair,
        "before": previous.get("before") or report["before"],
        "after": report["after"],
        "plan": composed.hash,
        "kept": pack(composed),
    }


def _origin(name: str) -> dict[str, str]:
    """Of a Hub id that id; of a directory its name, and the licence that its README.md states."""
    home = Path(name)
    if not name or not home.is_dir():
        return {"base_model": name}
    card = home / "README.md"
    licence = ModelCard.load(str(card), ignore_metadata_errors=True).data.license if card.is_file() else None
    return {"base_model": home.resolve().name, **({"license": str(licence)} if licence else {})}


def _proof_rows(batches: Sequence[Batch]) -> Batch:
    first = batches[0]
    return Batch({k: v[:PROOF_ROWS] for k, v in first.inputs.items()}, {}, first.held_out[:PROOF_ROWS])


def _quantiles(scores: Mapping[SiteKey, torch.Tensor]) -> list[dict[str, Any]]:
    """The scores of each site, [U], at equal steps from the least to the greatest."""
    steps = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return [
        {"stack": stack, "layer": layer, "kind": kind}
        | {"quantiles": [float(f"{q:.4g}") for q in values.double().cpu().quantile(steps).tolist()]}
        for (stack, layer, kind), values in scores.items()
    ]


def _other_shapes(analysis: Analysis, plan: PruningPlan) -> dict[str, dict[str, float]]:
    """What the other shapes would keep and lose of the score at the same target, from the same statistics."""
    others: dict[str, dict[str, float]] = {}
    for shapes in SHAPES if analysis.scores and not plan.is_identity else ():
        if shapes == analysis.config.shapes:
            continue
        changed = replace(analysis.config, shapes=shapes, keep=min(1.0, plan.config.get("keep", analysis.config.keep)))
        with contextlib.suppress(ValueError):  # these units cannot reach the target in those shapes
            other = replace(analysis, config=changed).plan()
            others[shapes] = {key: other.cost[key] for key in ("keep", "predicted_loss")}
    return others
