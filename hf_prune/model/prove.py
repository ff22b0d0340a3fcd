"""Whether a row is true, on a small instance in float64: cut = masked = built anew from the smaller config.

A mask that changes nothing proves nothing: every matrix that is sliced must matter to the outputs that are compared.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from .axes import Axis, Family, Part, Stack
from .configs import set_
from .cut import cut_
from .depth import drop_layers_
from .effects import changed
from .embeddings import cut_tokens_
from .feed import FIRST_ID, Feed, observed, tensors
from .instance import build
from .silence import skipped, without
from .sites import Counts, Extent, Site, find_sites, find_stacks, tensor_of
from .tokens import token_parts

EXACT, ROUNDED = 1e-6, 3e-4  # of the largest output, in float64 and in float32
MATTERS = 10  # times the tolerance: the least that what is masked must change

Outputs = list[torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A small model with inputs, and how it is built again from another config."""

    model: Any
    feeds: Sequence[Feed]

    @cached_property
    def dense(self) -> Outputs:
        return observed(self.model, list(self.feeds))

    @cached_property
    def slopes(self) -> dict[str, torch.Tensor]:
        """Of every parameter, how much the outputs depend on each of its elements."""
        ends = []
        for feed in self.feeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                ends.append(_weighed(getattr(self.model, feed.method)(**feed.inputs)))
        named = {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        unlike = list({id(p): p for p in named.values()}.values())
        found = torch.autograd.grad(sum(ends), unlike, allow_unused=True)  # type: ignore[arg-type]
        by_id = {id(p): g for p, g in zip(unlike, found, strict=True)}
        return {n: torch.zeros_like(p) if by_id[id(p)] is None else by_id[id(p)] for n, p in named.items()}

    @property
    def tolerance(self) -> float:
        return EXACT if self.model.dtype == torch.float64 else ROUNDED

    def built(self, config: Any, weights: Mapping[str, torch.Tensor]) -> Any:
        """A model of another config, with these weights.

        Raises:
            RuntimeError: they do not fit.
        """
        model = build(type(self.model), config, dtype=self.model.dtype)
        model.load_state_dict(weights)
        return model


def _weighed(output: Any) -> torch.Tensor:
    """A sum of all outputs with weights that cancel nothing."""
    total: Any = 0.0
    for number, tensor in enumerate(tensors(output)):
        if tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number)).to(tensor)
            total = total + (tensor * weights).sum()
    return total


def distance(a: Outputs, b: Outputs) -> float:
    """The largest difference, where 1 is the largest output of that kind."""
    if [x.shape for x in a] != [y.shape for y in b]:
        return float("inf")
    return max((_gap(x, y) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _gap(x: torch.Tensor, y: torch.Tensor) -> float:
    """Where a model masks by -inf, both must; a difference that is no number is infinite."""
    differs = torch.where(x == y, 0.0, (x - y).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    largest = y[y.isfinite()].abs().max() if y.isfinite().any() else torch.ones(())
    return float(differs.max() / largest.clamp_min(1e-30))


def units(subject: Subject, stacks: Sequence[Stack]) -> str:
    """Why the sublayers of stacks, all sized by the same keys, are not proven; "" where they are.

    Of query heads that share keys and values, both are cut: whole groups, and heads of every group. So are experts, and
    the neurons in each; these in place alone where the config cannot say them.
    """
    try:
        sites = find_sites(subject.model, Family(subject.model.config.model_type, tuple(stacks)))
        axes = {site.outer.name: site.outer for site in sites}
        axes |= {site.inner.name: site.inner for site in sites if site.share > 1}
        tried = (_differs(subject, sites, axis) for axis in axes.values())
        return _unmoved(subject, sites) or next(filter(None, tried), "") or _linear(subject, sites)
    except Exception as error:  # a wrong row fails in many ways
        return _short(error)


def per_layer(subject: Subject, stacks: Sequence[Stack]) -> str:
    """Why sublayers, each cut to a size of its own in place, are not proven; "" where they are."""
    try:
        found = find_sites(subject.model, Family(subject.model.config.model_type, tuple(stacks)))
        sites = [site for site in found if site.active]
        kept = {site.key: _some(site, site.outer, _own_count(site)) for site in sites}
        small, masked = _cut(subject, sites, sites[0].outer.name, kept)
        return _silent(subject, masked) or _unmoved(subject, sites) or _in_place(subject, small, masked)
    except Exception as error:
        return _short(error)


def _own_count(site: Site) -> int:
    of = site.sizes[site.outer.name]
    return max(1, site.routed, of // 2 - (0 if site.inner.tied else site.layer % 2))


def _some(site: Site, axis: Axis, count: int) -> list[int]:
    """So many units of the outer axis, or of the inner one in every outer one: others in every site."""
    draw = random.Random("all" if site.inner.tied else site.name)
    if axis.name == site.outer.name:
        return sorted(draw.sample(range(site.sizes[axis.name]), count))
    groups = range(site.sizes[site.outer.name])
    return [group * site.share + unit for group in groups for unit in sorted(draw.sample(range(site.share), count))]


def _unmoved(subject: Subject, sites: Sequence[Site]) -> str:
    """A sliced tensor that the outputs do not depend on."""
    for site in sites:
        for part in site.parts:
            slope = subject.slopes.get(f"{site.path}.{part.tensor}")
            if part.role != "carries" and slope is not None and not slope.any():
                return f"the outputs do not depend on {site.path}.{part.tensor}"
    return ""


def _linear(subject: Subject, sites: Sequence[Site]) -> str:
    """Units without a nonlinearity are the rank of a product of matrices, no neurons: all may change their sign."""
    neurons = [site for site in sites if not site.inner.mixes]
    if not neurons:
        return ""
    flipped = copy.deepcopy(subject.model)
    with torch.no_grad():
        done: set[int] = set()
        for site in neurons:
            for part in (part for part in site.parts if part.role != "routes"):
                tensor = tensor_of(flipped.get_submodule(site.path), part.tensor)
                if id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.neg_()
    gap = distance(observed(flipped, list(subject.feeds)), subject.dense)
    return "they are the rank of a product of matrices, without a nonlinearity" if gap < subject.tolerance else ""


def _differs(subject: Subject, sites: Sequence[Site], axis: Axis) -> str:
    """Why the model with half of the units of an axis is not proven."""
    here = [site for site in sites if site.axis(axis.name)]
    counts = {site.key: _half(site, axis) for site in here}
    kept = {site.key: _some(site, axis, _units_of(axis, site, counts[site.key])) for site in here}
    small, masked = _cut(subject, here, axis.name, kept)
    if axis.stock == "none":
        return _silent(subject, masked) or _in_place(subject, small, masked)
    values: dict[str, Any] = {key: value for site in here for key, value in site.said(counts[site.key]).items()}
    values |= {a.width_config: s.widths[a.name] for s in sites for a in s.row.axes if a.width_config}
    config = changed(subject.model.config, values)
    for key, value in values.items():
        set_(small.config, key, value)
    return _silent(subject, masked) or _reason(subject, small, config, masked)


def _half(site: Site, axis: Axis) -> Counts:
    """The sizes of a site with half of the units of an axis, of an inner one in every outer one."""
    groups = site.sizes[site.outer.name]
    if axis.name == site.outer.name:
        return site.counts(max(1, groups // 2, site.routed), site.share)
    return site.counts(groups, max(1, site.share // 2))


def _units_of(axis: Axis, site: Site, counts: Counts) -> int:
    """How many units of an axis these counts are: of an inner one in every outer one."""
    return counts[axis.name] // (1 if axis.name == site.outer.name else counts[site.outer.name])


def _cut(subject: Subject, sites: Sequence[Site], axis: str, kept: Mapping[Any, Sequence[int]]) -> tuple[Any, Outputs]:
    """A copy of the model cut in place, and the outputs of the masked one."""
    small = copy.deepcopy(subject.model)
    with ExitStack() as stack:
        for site in sites:
            cut_(small.get_submodule(site.path), site, axis, kept[site.key])
            left = site.expand(axis, kept[site.key])
            stack.enter_context(without(subject.model.get_submodule(site.path), site, left))
        return small, observed(subject.model, list(subject.feeds))


def _silent(subject: Subject, masked: Outputs) -> str:
    near = distance(masked, subject.dense) < MATTERS * subject.tolerance
    return "the outputs do not depend on these units" if near else ""


# --- layers and tokens -----------------------------------------------------------------------------------------------


def layers(subject: Subject, stack: Stack) -> tuple[tuple[int, ...], str]:
    """The layers of a stack that must stay, and why the others are not proven to be able to go; "" where they are."""
    extent = find_stacks(subject.model, Family(subject.model.config.model_type, (stack,)))[0]
    reasons = {gone: _without(subject, extent, gone) for gone in range(extent.of)}
    fixed = tuple(gone for gone, reason in reasons.items() if reason)
    if fixed in ((), (0,)) and extent.of > 1:
        return fixed, ""
    return (), reasons[fixed[-1]] if fixed else "it is the only layer"


def _without(subject: Subject, extent: Extent, gone: int) -> str:
    """Why the model without a layer is not proven."""
    kept = [index for index in range(extent.of) if index != gone]
    try:
        with skipped(subject.model.get_submodule(extent.layers[gone])):
            masked = observed(subject.model, list(subject.feeds))
        small = copy.deepcopy(subject.model)
        drop_layers_(small, extent, kept)
        return _silent(subject, masked) or _reason(subject, small, small.config, masked)
    except Exception as error:
        return _short(error)


def tokens(subject: Subject, key: str) -> str:
    """Why a smaller vocabulary is not proven; "" where it is."""
    try:
        parts = token_parts(subject.model, [])
        rows = tensor_of(subject.model, parts[0].tensor).shape[parts[0].dim] if parts else 0
        ids = {
            int(i)
            for feed in subject.feeds
            for n, x in feed.inputs.items()
            if n.endswith("input_ids")
            for i in x.unique()
        }
        kept = sorted({*range(FIRST_ID), *ids})
        if not ids or len(kept) >= rows:
            return "no inputs of the small instance are tokens of this vocabulary"
        small = copy.deepcopy(subject.model)
        cut_tokens_(small, Extent((), Axis("tokens", key), rows, parts=parts), kept)
        set_(small.config, key, len(kept))
        new = {old: index for index, old in enumerate(kept)}
        feeds = [replace(f, inputs={n: _renamed(n, x, new) for n, x in f.inputs.items()}) for f in subject.feeds]
        wanted = [x[..., kept] if x.shape[-1:] == (rows,) else x for x in subject.dense]
        return _unmoved_rows(subject, parts) or _reason(
            replace(subject, feeds=feeds), small, changed(small.config, {}), wanted
        )
    except Exception as error:
        return _short(error)


def _renamed(name: str, value: torch.Tensor, new: Mapping[int, int]) -> torch.Tensor:
    return value.clone().apply_(lambda i: new[i]) if name.endswith("input_ids") else value


def _unmoved_rows(subject: Subject, parts: Sequence[Part]) -> str:
    still = [p.tensor for p in parts if p.tensor in subject.slopes and not subject.slopes[p.tensor].any()]
    return f"the outputs do not depend on {still[0]}" if still else ""


def _reason(subject: Subject, small: Any, config: Any, wanted: Outputs) -> str:
    """Why a cut model, and the one that is built anew from its config, do not give what is wanted."""
    if wrong := _in_place(subject, small, wanted):
        return wrong
    gap = distance(observed(subject.built(config, small.state_dict()), list(subject.feeds)), wanted)
    return f"built anew, the outputs differ from the masked ones by {gap:.1e}" if gap > subject.tolerance else ""


def _in_place(subject: Subject, small: Any, wanted: Outputs) -> str:
    """Why a model that is cut in place does not give what is wanted."""
    gap = distance(observed(small, list(subject.feeds)), wanted)
    return f"cut in place, the outputs differ from the masked ones by {gap:.1e}" if gap > subject.tolerance else ""


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
