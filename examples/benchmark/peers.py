"""Torch-Pruning and optipfair themselves, on the models and calibration rows that hf_prune gets.

Both know one ratio for the whole model. It is found with their own rounding rules, so that hf_prune's accounting of
what is left just meets `keep`; what was really left is checked afterwards. Widths are rounded to the same multiple as
in hf_prune by each tool's own option (`round_to`, `expansion_divisor`), so that latency compares.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tasks import Prepared, Task

from hf_prune import describe
from hf_prune.decide.costs import cost_model
from hf_prune.decide.units import default_align
from hf_prune.model.anatomy import Anatomy
from hf_prune.model.batches import Batch, forward_inputs
from hf_prune.model.probe import probe_inputs
from hf_prune.model.sites import Counts, Site, module_of
from hf_prune.score.losses import example_losses

TRACE_LENGTH = 7  # of no other dimension: Torch-Pruning reads axes off their sizes
Left = Callable[[Site, float], Counts]  # (site, ratio removed) -> units left


def ratio_for(task: Task, anatomy: Anatomy, keep: float, left: Left) -> float:
    """The smallest ratio removed, in steps of 0.001, that leaves at most `keep` of the task's cost.

    Raises:
        ValueError: no ratio does.
    """
    config = task.config()
    cost = cost_model(anatomy, config.metric, config.sequence_length, str(config.scope))
    dense = cost.total(anatomy.sizes)
    for step in range(1, 1000):
        sizes = {site.key: left(site, step / 1000) for site in anatomy.sites}
        if min(count for counts in sizes.values() for count in counts.values()) < 1:
            break
        if cost.total({**anatomy.sizes, **sizes}) <= keep * dense:
            return step / 1000
    raise ValueError(f"keep={keep} of the {config.metric} is not reachable with one ratio for all layers")


def check_counts(model: Any, anatomy: Anatomy, ratio: float, left: Left) -> None:
    found = {site.key: site.sizes for site in describe(model).sites}
    wanted = {site.key: left(site, ratio) for site in anatomy.sites}
    if found != wanted:
        raise RuntimeError(f"ratio {ratio} left {found}, expected {wanted}")


# --- Torch-Pruning ---------------------------------------------------------------------------------------------------


def torch_pruning(importance: str) -> Callable[[Task], Prepared]:
    """FFN neurons and whole heads at one ratio, the hidden width untouched; `importance`: a class of tp.importance."""

    def prepare(task: Task) -> Prepared:
        tp = importlib.import_module("torch_pruning")
        score = getattr(tp.importance, importance)()
        gradients = _gradients(task) if "Taylor" in importance else {}

        def cut(model: Any, keep: float) -> Any:
            for name, parameter in model.named_parameters():
                parameter.grad = gradients.get(name)
            _cut(tp, task, model, score, keep)
            model.zero_grad(set_to_none=True)
            return model

        return Prepared(cut)

    return prepare


def _gradients(task: Task) -> dict[str, torch.Tensor]:
    """Of the mean loss over the calibration rows: what `loss.backward()` leaves in Torch-Pruning's own examples."""
    batches, model = task.batches(), task.model
    total = sum(batch.size for batch in batches)
    for batch in batches:
        length = next(iter(batch.inputs.values())).shape[1]
        for rows in torch.arange(batch.size).split(max(1, 2048 // length)):  # an LM's logits of 32 rows are gigabytes
            some = Batch(_rows(batch.inputs, rows), _rows(batch.targets, rows), batch.held_out[rows])
            (example_losses(model, model(**forward_inputs(model, some)), some).sum() / total).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _rows(tensors: dict[str, torch.Tensor], rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value[rows] for name, value in tensors.items()}


def _tp_left(site: Site, ratio: float, align: int, heads_removed: int) -> Counts:
    """What BasePruner keeps: of the channels `int` of the rest, then `round_to`; under GQA every KV head."""
    if not site.inner.mixes:
        kept = int(site.columns * (1 - ratio))
        return site.counts(kept - kept % align, 1)
    heads = site.sizes[site.inner.name] - heads_removed
    groups = heads if site.share == 1 else site.sizes[site.outer.name]
    return site.counts(groups, heads // groups)


def _tp_ratio(task: Task, anatomy: Anatomy, keep: float, align: int) -> tuple[float, int, Left]:
    """(ratio of the neurons, heads removed, what that leaves): the pair nearest to one ratio for both.

    Strictly one ratio would overshoot `keep` by up to a whole head in every layer.
    """
    attention = next(site for site in anatomy.sites if site.inner.mixes)
    heads = attention.sizes[attention.inner.name]
    step = 1 if attention.share == 1 else attention.sizes[attention.outer.name]  # GQA: one of each KV head's
    found: list[tuple[float, float, int, Left]] = []
    for removed in range(0, heads, step):
        left = partial(_tp_left, align=align, heads_removed=removed)
        with contextlib.suppress(ValueError):  # too few heads removed for this keep
            ratio = ratio_for(task, anatomy, keep, left)
            found.append((abs(ratio - removed / heads), ratio, removed, left))
    if not found:
        raise ValueError(f"keep={keep} is not reachable with FFN neurons and heads at one ratio for all layers")
    return min(found, key=lambda pair: pair[0])[1:]


def _cut(tp: Any, task: Task, model: Any, importance: Any, keep: float) -> None:
    anatomy = describe(model)
    align = default_align(anatomy, model.device.type)
    ratio, removed, left = _tp_ratio(task, anatomy, keep, align)
    heads: dict[Any, int] = {}
    prunable: set[Any] = set()
    for site in anatomy.sites:
        makers = {
            model.get_submodule(f"{site.path}.{module_of(part.tensor)}"): site.sizes[part.axes[0]]
            for part in site.parts
            if part.role == "makes"
        }
        prunable |= {*makers}
        if site.inner.mixes:
            heads |= makers
            count = site.sizes[site.inner.name]
    # The output projections, embeddings' users and heads all write or end the hidden width: ignored, it stays.
    ignored = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m not in prunable]
    attention = model.config._attn_implementation
    # Traced with eager attention: SDPA's fused GQA hides which KV head belongs to which query heads from the graph,
    # and Torch-Pruning 1.6.1 then fails with "shape '[9, -1]' is invalid for input of size 192" (SmolLM2).
    model.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Unwrapped parameters": RMSNorm, as wide as the hidden size, not pruned
            tp.pruner.BasePruner(
                model,
                {**probe_inputs(model, TRACE_LENGTH), **({"use_cache": False} if model.can_generate() else {})},
                importance=importance,
                pruning_ratio=ratio,
                head_pruning_ratio=max(0.0, removed - 0.5) / count,  # of which it takes `ceil`
                num_heads=heads,
                prune_num_heads=True,
                prune_head_dims=False,
                ignored_layers=ignored,
                round_to=align,
                in_channel_groups={},  # its defaults are shared by all pruners of a process, and are written to
                out_channel_groups={},
                output_transform=lambda output: output.logits.sum(),
            ).step()
    finally:
        model.set_attn_implementation(attention)
    _fix_attributes_(model)
    check_counts(model, anatomy, ratio, left)


def _fix_attributes_(model: Any) -> None:
    """Head counts that modules keep beside their weights; Torch-Pruning leaves them as they were.

    The config stays dense: no forward pass reads it, and from_pretrained could not open the result in any case (BERT
    derives the head size from it).
    """
    for site in describe(model).sites:
        for count in site.row.counts:
            owner, _, name = f"{site.path}.{count.attribute}".rpartition(".")
            value = {"units": site.sizes[count.axis], "columns": site.columns, "each": site.share}[count.of]
            setattr(model.get_submodule(owner), name, value)


# --- optipfair -------------------------------------------------------------------------------------------------------


def optipfair(selection: str, with_data: bool = False) -> Callable[[Task], Prepared]:
    """FFN neurons of gated FFNs, the same share in every layer; with data, its hybrid of weights and activations."""

    def prepare(task: Task) -> Prepared:
        tool = importlib.import_module("optipfair")
        logging.getLogger().setLevel(logging.WARNING)  # its import sets the root logger to INFO
        if not importlib.import_module("optipfair.pruning.utils").validate_model_for_glu_pruning(task.model):
            tool.prune_model(task.model, show_progress=False)  # refuses in its own words, and changes nothing
        rows = [batch.inputs for batch in task.batches()] if with_data else None

        def cut(model: Any, keep: float) -> Any:
            anatomy = describe(model)
            align = default_align(anatomy, model.device.type)
            left = partial(_optipfair_left, align=align)
            ratio = ratio_for(task, anatomy, keep, left)
            tool.prune_model(
                model,
                neuron_selection_method=selection,
                pruning_percentage=100 * ratio,
                expansion_divisor=align if align in (32, 64, 128, 256) else None,
                dataloader=rows,
                show_progress=False,
            )
            check_counts(model, anatomy, ratio, left)
            return model

        return Prepared(cut)

    return prepare


def _optipfair_left(site: Site, ratio: float, align: int) -> Counts:
    if site.inner.mixes:
        return site.sizes
    kept = site.columns - int(100 * ratio / 100 * site.columns)
    return site.counts(kept - kept % align if align in (32, 64, 128, 256) else kept, 1)
