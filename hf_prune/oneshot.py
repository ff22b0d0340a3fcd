"""prune(): score, decide, then cut and repair layer by layer. The order of calls; the maths lives elsewhere.

Shapes: B examples, T tokens, U units.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .checkpoint.history import History, history_of, proof_rows, summary_of
from .checkpoint.layout import write_
from .config import PruningConfig, config_or
from .decide.allocate import FAR_BELOW, SHAPES, allocate, everything, reachable, warn_if_far_below
from .decide.costs import COSTS, planned_sizes
from .decide.costs import report as cost_report
from .decide.latency.cache import latency_table
from .decide.latency.table import LatencyTable
from .decide.latency.watch import Watch
from .decide.units import asked, choose_units, considered, default_align, follow_the_stream, unit_of, widths
from .execute import Repair, check_plan, execute_, touched
from .model.anatomy import Anatomy, describe
from .model.batches import Batch, draw
from .model.configs import all_configs
from .model.depth import check_droppable
from .model.memory import given_back
from .model.offload import check_in_memory, device_of, tie_again_
from .model.undo import undone_on_error
from .model.weights import check_cuttable, quiet
from .model.wide import HIDDEN
from .plan import Kept, PruningPlan, Where, must_be_plan
from .score.checks import check_inputs, fit_labels, idle_towers
from .score.criteria import CRITERIA
from .score.depth import order_of
from .score.judge import Judge
from .score.losses import has_loss
from .score.scoring import Scores, criterion_for, scored_rows, scores_of, token_gradients
from .score.statistics import ALONE, Ranks
from .score.width import channel_scores
from .search import Division, Search, least_predicted
from .vocabulary.choice import Vocabulary, token_configs, translation
from .vocabulary.trimming import trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTILES = 33  # of the scores of a site, in its report
TIMED = "metric='latency' times the model"


@dataclass
class PruneResult:
    """The pruned model (the one handed in), the plan relative to it as it was handed in, scores, and a report.

    `processing_class` is the tokenizer of a shortened vocabulary, else the one that was given.
    """

    model: PreTrainedModel
    plan: PruningPlan
    scores: dict[Where, torch.Tensor]
    report: dict[str, Any]
    processing_class: Any = None


@dataclass
class Analysis:
    """One statistics pass: scores from which plans for any `keep` follow without running the model again."""

    anatomy: Anatomy
    config: PruningConfig  # with the criterion filled in
    batches: list[Batch]
    align: int
    scores: dict[Where, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    gates: dict[Where, torch.Tensor] = field(default_factory=dict)  # of each example, where the criterion uses them
    tokens: dict[Where, list[torch.Tensor]] = field(default_factory=dict)  # squared gradients, see repair.solve
    whole: tuple[Kept, ...] = ()  # sites of a tower that no example reaches
    table: LatencyTable | None = None  # measured, for metric "latency"
    search: Search | None = None  # where layers or tokens are among the units
    vocabulary: Vocabulary | None = None
    processing_class: Any = None

    def plan(self, keep: float | None = None) -> PruningPlan:
        """The plan of least predicted loss for a `keep` (default: the config's); `decide` measures several.

        Raises:
            ValueError: not reachable with these units and shapes.
        """
        return least_predicted(self._divisions(keep)).plan

    def decide(self, model: PreTrainedModel, keep: float | None = None) -> tuple[PruningPlan, list[dict[str, Any]]]:
        """The plan for a `keep`, and what was tried for it. The model is as it was afterwards.

        Where layers or tokens are among the units, or layers may differ, several divisions of the budget are cut,
        repaired and compared on held-out rows; among the latter is the one that treats all layers alike.
        """
        divisions = self._divisions(keep)
        if self.search is None or len(divisions) == 1:
            return divisions[0].plan, []
        best, tried = self.search.best(model, divisions, self._repair(), self.config.candidates)
        return best.plan, [division.row() for division in tried]

    def _divisions(self, keep: float | None) -> list[Division]:
        """What the budget can be divided into: over layers and tokens, or alike and unlike over the layers."""
        config = self.config if keep is None else replace(self.config, keep=keep)
        if self.search is not None and self.search.is_wide:
            return self.search.divisions(partial(self._allocate, config))
        plans = [self._allocate(config, ())]
        if self.search is not None and config.keep < 1:
            with contextlib.suppress(ValueError):  # out of reach, or layers that differ already
                alike = self._allocate(replace(config, shapes="uniform"), ())
                if alike.cost["keep"] >= FAR_BELOW * config.keep:  # one that removes far more is no like for like
                    plans.append(replace(alike, config=config.to_dict()))
        return [Division(plan) for plan in plans]

    def _allocate(self, config: PruningConfig, wide: Sequence[Kept]) -> PruningPlan:
        across = CRITERIA[str(config.criterion)].across
        plan = allocate(self.anatomy, self.scores, config, self.align, across, self.gates, self.table, wide)
        return replace(plan, kept=(*plan.kept, *self.whole))

    def _repair(self) -> Repair:
        return Repair(self.config.repair, self.batches, self.tokens, self.config.batch_norm)

    @given_back()
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
        check_cuttable(model, self.config.keep if keep is None else keep)
        tried: list[dict[str, Any]] = []
        if plan is None:
            plan, tried = self.decide(model, keep)
            warn_if_far_below(plan.cost["keep"], self.config if keep is None else replace(self.config, keep=keep))
        check_plan(model, describe(model), plan)
        return _cut_(model, self, plan, tried)


@given_back()
def analyze(
    model: PreTrainedModel,
    data: Any,
    config: PruningConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    vocabulary: Any = None,
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
    check_cuttable(model, config.keep)
    if config.metric == "latency":
        check_in_memory(model, TIMED)
    units = choose_units(anatomy, config)
    anatomy = considered(anatomy, units)
    align = config.align or default_align(anatomy, device_of(model).type)
    _check_repair(anatomy, config)
    words = Vocabulary.of(model, processing_class, vocabulary, data, config) if "tokens" in units else None
    if "layers" in units:
        check_droppable(model, anatomy)
    table = latency_table(model, anatomy, config, align) if config.metric == "latency" else None
    alone = not {"layers", "tokens"} & {*units}
    if alone:
        _check_reachable(anatomy, config, units, align, table)
    batches = _draw(model, data, config, processing_class, data_collator, guard)
    may_go = _free(anatomy, units) | ({*HIDDEN} & {*units})
    config = replace(config, criterion=criterion_for(model, batches, config.criterion, may_go))  # type: ignore[arg-type]
    idle = idle_towers({extent.where[0] for extent in anatomy.extents if extent.path}, batches)
    whole = tuple(everything(site, config) for site in anatomy.sites if site.stack in idle)
    if idle:
        anatomy = _without(anatomy, idle)
        units = choose_units(anatomy, config)
        if alone:
            _check_reachable(anatomy, config, units, align, table)
    axes, criterion = _axes(anatomy, units), CRITERIA[str(config.criterion)]
    free = _free(anatomy, units)
    any_may = free or follow_the_stream(anatomy, units)  # else only layers, tokens or channels
    scored = [site for site in anatomy.sites if any_may and (not criterion.of or axes[site.key] in free)]
    found = scores_of(model, scored, axes, batches, criterion, config.calibration_seed, ranks) if scored else Scores()
    alike = {site.key: torch.ones(site.sizes[axes[site.key]]) for site in anatomy.sites if site not in scored}
    found.scores.update(alike)
    if "hidden" in units:
        extent, rows = anatomy.extent(*HIDDEN), scored_rows(batches)
        layers = [model.get_submodule(path) for path in dict.fromkeys(site.path for site in anatomy.sites)]
        found.scores[HIDDEN] = channel_scores(model, extent, rows, criterion, config.calibration_seed, layers)
    return Analysis(
        anatomy,
        config,
        batches,
        align,
        **vars(found),
        whole=whole,
        table=table,
        search=_search(model, anatomy, config, units, batches, words, found.scores.get(HIDDEN)),
        vocabulary=words,
        processing_class=processing_class,
        seconds=time.perf_counter() - started,
    )


def _without(anatomy: Anatomy, stacks: Collection[str]) -> Anatomy:
    """The anatomy whose units may go where those of some stacks may not."""
    sites = tuple(site for site in anatomy.sites if site.stack not in stacks)
    return replace(
        anatomy, sites=sites, extents=tuple(e for e in anatomy.extents if e.where[:1] not in {(s,) for s in stacks})
    )


def _free(anatomy: Anatomy, units: Sequence[str]) -> set[str]:
    """The axes of sites whose units may go."""
    return {axis.name for site in anatomy.sites for axis in site.row.axes if asked(axis, units)}


def _axes(anatomy: Anatomy, units: Sequence[str]) -> dict[Where, str]:
    return {site.key: unit_of(site, units) for site in anatomy.sites}


def _draw(model: Any, data: Any, config: PruningConfig, processing_class: Any, data_collator: Any, guard: Any) -> Any:
    samples, seed = config.calibration_samples, config.calibration_seed
    batches = draw(model, data, samples, seed, processing_class, data_collator, guard=guard)
    check_inputs(model, batches)
    return batches


def _search(
    model: PreTrainedModel,
    anatomy: Anatomy,
    config: PruningConfig,
    units: Sequence[str],
    batches: Sequence[Batch],
    words: Vocabulary | None,
    channels: torch.Tensor | None,
) -> Search | None:
    """What the budget can be divided into, where it is shared with layers, tokens or hidden channels."""
    unlike = config.shapes == "per_layer" and config.candidates > 1
    if words is None and channels is None and "layers" not in units and not unlike:
        return None
    rows = scored_rows(batches)
    stacks = [e for e in anatomy.extents if e.path and e.axis.config] if "layers" in units else []
    found = Search(
        anatomy,
        Judge.of(model, batches),
        {
            extent.where: order_of(config.layer_criterion, model, extent, rows, config.calibration_seed, extent.of - 1)
            for extent in stacks
        },
        _vocabularies(anatomy, config, words),
        None if words is None else lambda kept: translation(words.tokenizer, trimmed(words.tokenizer, kept), model),
        {} if channels is None else _streams(channels, widths(anatomy, units, config.align)),
    )
    if stacks:
        found.measure_(model)
    return found


def _streams(scores: torch.Tensor, counts: Sequence[int]) -> dict[tuple[int, ...], float]:
    """The channels of most score, ever fewer of them; with the share of the score that is lost."""
    order, total = scores.argsort(descending=True, stable=True), float(scores.sum()) or 1.0
    return {tuple(sorted(order[:n].tolist())): float(scores[order[n:]].sum()) / total for n in counts}


def _vocabularies(anatomy: Anatomy, config: PruningConfig, words: Vocabulary | None) -> dict[tuple[int, ...], float]:
    """What is used, and, where tokens count in the metric, ever less of it; with the share of all uses that is lost."""
    if words is None:
        return {}
    cost = COSTS.get(config.metric)  # there is none for latency, in which the embeddings are but looked up
    counted = cost is not None and cost(anatomy, config.sequence_length, config.scope or "model").token
    return {kept: words.lost(kept) for kept in (words.levels() if counted else [words.kept()])}


def prune(
    model: PreTrainedModel,
    data: Any,
    config: PruningConfig | None = None,
    *,
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    vocabulary: Any = None,
    plan: PruningPlan | None = None,
    guard: Any = None,
) -> PruneResult:
    """Make a model smaller in place: score, decide, cut and repair; its config then says the new sizes.

    Args:
        data: list or iterable of batches (dicts of tensors for `model(**batch)`), a DataLoader, or a datasets.Dataset
            with `processing_class` or `data_collator`.
        processing_class: the tokenizer; with tokens among the units the one of the smaller model is in the result.
        vocabulary: texts whose tokens stay, with tokens among the units: strings, a file, a dataset, or (dataset,
            column), read as a stream. Default: the tokens of all of `data`.
        plan: replay this plan instead of deciding one (it is checked against the model); `config` defaults to the one
            that it was made with. Where the repair weighs tokens by their gradients, those are computed; to cut to
            several targets after one pass, see `Analysis.cut_`.
        guard: data of another source than `data`, in the same forms: a repair is refused where it makes the error on
            them larger, and several divisions of the budget are compared by their loss on them. Nothing is scored or
            fitted on them. For language models, text unlike the calibration text.

    Raises:
        ValueError: unknown family; quantised, meta or sharded weights (offloaded ones are cut where they lie, but not
            by latency); no loss for a gradient criterion; fewer than 8
            examples; `keep` not reachable; `repair="bias"` without biases; NaN in the scores; a plan for another
            model; layers or tokens that cannot go. All before anything is changed; and what is stopped later, by an
            error or an interrupt, leaves the model as it was.
    """
    if plan is None:
        analysis = analyze(
            model,
            data,
            config,
            processing_class=processing_class,
            data_collator=data_collator,
            vocabulary=vocabulary,
            guard=guard,
        )
        return analysis.cut_(model)
    must_be_plan(plan)
    config = config_or(config, lambda: PruningConfig.from_dict(plan.config))
    anatomy = describe(model)
    check_cuttable(model, plan.cost.get("keep", 1.0))
    if plan.config.get("metric") == "latency":
        check_in_memory(model, TIMED)
    check_plan(model, anatomy, plan)
    _check_repair(anatomy, config)
    batches = _draw(model, data, config, processing_class, data_collator, guard)
    analysis = Analysis(anatomy, config, batches, config.align or 1, processing_class=processing_class)
    by_loss = config.criterion is not None and CRITERIA[config.criterion].needs_loss
    if config.repair == "least_squares" and by_loss and has_loss(model, batches):
        fit_labels(model, scored_rows(batches))
        axes = _axes(anatomy, choose_units(anatomy, config))
        analysis.tokens = token_gradients(model, anatomy.sites, axes, batches, str(config.criterion))
    return _cut_(model, analysis, plan, [])


@given_back()
def _cut_(
    model: PreTrainedModel, analysis: Analysis, plan: PruningPlan, tried: Sequence[Mapping[str, Any]]
) -> PruneResult:
    """Cut and repair a model by a plan that fits it. In place, all of it or nothing."""
    anatomy = analysis.anatomy
    earlier = history_of(model)
    composed = plan if earlier is None else _composed(earlier.plan, plan)
    after, rows = _in_new_tokens(model, analysis, plan)
    timed = plan.config.get("metric") == "latency"
    if timed:
        check_in_memory(model, TIMED)
    watch = Watch.start(model, anatomy, PruningConfig.from_dict(plan.config)) if timed else None
    report = _report(analysis, plan) | {"divisions": list(tried)}
    configs = {id(config): config for config in (*all_configs(model), *token_configs(model))}
    with quiet(model), undone_on_error(touched(model, anatomy, plan), list(configs.values())):
        started = time.perf_counter()
        if not plan.is_identity:
            report["repairs"] = execute_(model, anatomy, plan, analysis._repair())
            write_(model, anatomy.family, summary_of(model, report, composed))
        report["seconds"]["cut_and_repair"] = time.perf_counter() - started
        if watch is not None:
            report["latency"] = watch.stop(model, plan) | {"table": analysis.table.source if analysis.table else None}
        cuts = (*(earlier.cuts if earlier else ()), report)
        model._hf_prune = History(composed, rows, cuts, after)  # type: ignore[assignment]
    tie_again_(model)
    return PruneResult(model, plan, analysis.scores, report, after or analysis.processing_class)


def _in_new_tokens(model: PreTrainedModel, analysis: Analysis, plan: PruningPlan) -> tuple[Any, Batch | None]:
    """The tokenizer of a shortened vocabulary, proven on the texts, and the rows to prove the save with, in its tokens.

    Raises:
        ValueError: no tokenizer was given. RuntimeError: it tokenises a text otherwise than before.
    """
    rows, chosen = proof_rows(analysis.batches), plan.get(())
    if chosen is None or chosen.is_identity:
        return None, rows
    if analysis.processing_class is None:
        raise ValueError("The plan shortens the vocabulary: give processing_class=, the tokenizer to shorten with it.")
    words, tokenizer = analysis.vocabulary, analysis.processing_class
    after = trimmed(tokenizer, chosen.kept) if words is None else words.proven(chosen.kept)
    return after, None if rows is None else translation(tokenizer, after, model)(rows)


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
    before = cost_report(anatomy, anatomy.sizes, length)
    after = cost_report(anatomy, planned_sizes(anatomy, plan), length)
    counted = f"{plan.cost.get('metric')}_{plan.cost.get('scope')}"  # a latency is not
    return {
        **plan.cost,
        **({"keep": after[counted] / before[counted]} if counted in after else {}),
        "before": before,
        "after": after,
        "config": dict(plan.config),
        "criterion": analysis.config.criterion,
        "repair": analysis.config.repair,
        "calibration": {
            "rows": sum(batch.size for batch in analysis.batches),
            "tokens": sum(batch.tokens for batch in analysis.batches),
        },
        "scores": _quantiles(analysis.scores),
        "repairs": [],
        "other_shapes": _other_shapes(analysis, plan),
        "seconds": {"score": analysis.seconds},
    }


def _check_repair(anatomy: Anatomy, config: PruningConfig) -> None:
    without = [site.name for site in anatomy.sites if not site.has_bias]
    if config.repair == "bias" and without:
        raise ValueError(
            f"repair='bias' needs a bias on every consumer; {len(without)} have none in a stock {anatomy.model_type} "
            f"(first: {without[0]}), and one is never created. Use repair='least_squares' or 'none'."
        )


def _check_reachable(
    anatomy: Anatomy, config: PruningConfig, units: Sequence[str], align: int, table: LatencyTable | None
) -> None:
    wide = []
    if "hidden" in units:
        extent, narrowest = anatomy.extent(*HIDDEN), widths(anatomy, units, config.align)[-1]
        wide = [Kept(HIDDEN, extent.axis.name, extent.of, tuple(range(narrowest)))]
    if config.keep < 1 and reachable(anatomy, config, align, table, wide) > config.keep:
        flat = {
            site.key: torch.ones(site.sizes[unit_of(site, choose_units(anatomy, config))]) for site in anatomy.sites
        }
        allocate(anatomy, flat, config, align, measured=table, wide=wide)  # raises, and says what can be reached


def _quantiles(scores: Mapping[Where, torch.Tensor]) -> list[dict[str, Any]]:
    """The scores of each site, [U], at equal steps from the least to the greatest."""
    steps = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    return [
        {"stack": stack, "layer": layer, "kind": kind}
        | {"quantiles": [float(f"{q:.4g}") for q in values.double().cpu().quantile(steps).tolist()]}
        for (stack, layer, kind), values in ((k, v) for k, v in scores.items() if len(k) == 3)
    ]


def _other_shapes(analysis: Analysis, plan: PruningPlan) -> dict[str, dict[str, float]]:
    """What the other shapes would keep and lose of the score at the same target, from the same statistics."""
    others: dict[str, dict[str, float]] = {}
    wide = any(len(kept.where) < 3 for kept in plan.kept)  # whose loss is measured, not predicted
    for shapes in SHAPES if analysis.scores and not (plan.is_identity or wide) else ():
        if shapes == analysis.config.shapes or shapes not in analysis.anatomy.family.shapes:
            continue
        changed = replace(analysis.config, shapes=shapes, keep=min(1.0, plan.config.get("keep", analysis.config.keep)))
        with contextlib.suppress(ValueError):  # these units cannot reach the target in those shapes
            other = replace(analysis, config=changed).plan()
            others[shapes] = {key: other.cost[key] for key in ("keep", "predicted_loss")}
    return others
