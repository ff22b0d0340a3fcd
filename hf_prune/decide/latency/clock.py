"""What is timed: one layer of each kind at a grid of counts, and the whole model with all of its layers cut.

A site's saving at a count is that of its layer, timed alone with all else dense. A layer alone finds its weights in the
processor's caches and a model does not, so the whole model is timed too, with every site at a few shares of its counts,
and savings are scaled to that. So the dense total is the measured one, and savings add up. All is timed in turn, round
after round, and medians are kept.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ...config import PruningConfig
from ...model import layerwise
from ...model.anatomy import Anatomy
from ...model.batches import Batch, forward_inputs
from ...model.cut import cut_, cut_arguments
from ...model.depth import without_layers
from ...model.probe import positions, random_inputs
from ...model.sites import Extent, Site
from ...model.weights import quiet
from ...plan import Where
from .table import TINY, Grid, LatencyTable, Level, evenly, monotone, table_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POINTS = 12  # counts timed per site, at most
ROUNDS, WARMUP = 15, 1  # over all counts and the dense model
LEVELS, LEVEL_ROUNDS = (2 / 3, 1 / 3, 0.0), 9  # shares of the counts at which the whole model is timed, descending
PASSES, SHORT = 3, 0.01  # timed in a row at each count after one that warms up; one where a pass takes these seconds
READ = ("input_ids", "pixel_values")  # what models are timed on
Inputs = dict[str, Any]


# --- a clock ---------------------------------------------------------------------------------------------------------


def timed(module: nn.Module, *args: Any, **kwargs: Any) -> float:
    """Seconds of one forward pass."""
    device = next(module.parameters()).device
    synchronize(device)
    started = time.perf_counter()
    module(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has been given to do; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- a layer alone ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A layer and what the model calls it with. B examples, T tokens, D hidden width."""

    layer: nn.Module
    hidden: torch.Tensor  # [B, T, D]
    kwargs: Inputs

    @classmethod
    def of(cls, model: nn.Module, site: Site, inputs: Inputs) -> Bench:
        """The layer of a site, and what reaches it when the model is called with `inputs`."""
        layer = model.get_submodule(site.path)
        stream = layerwise.capture(model, [layer], [inputs])
        return cls(layer, stream.states[0], stream.kwargs[0][0])

    def copy(self) -> Bench:
        return replace(self, layer=copy.deepcopy(self.layer))

    def seconds(self) -> float:
        """Median of a few passes in a row, after one that warms up."""
        first = self._pass()
        return statistics.median(self._pass() for _ in range(PASSES if first < SHORT else 1))

    def _pass(self) -> float:
        return timed(self.layer, self.hidden, **self.kwargs)

    def cut(self, site: Site, groups: int, each: int) -> tuple[Bench, Site]:
        """This bench with its layer cut, in place, to the first units of one site; and that site as it is now."""
        kept = _first(site, groups, each)
        cut_(self.layer, site, site.inner.name, kept)
        kwargs = cut_arguments(self.kwargs, site, site.inner.name, kept)
        return replace(self, kwargs=kwargs), site.resized(site.counts(groups, each))


# --- counts of a site, and a layer cut to them ------------------------------------------------------------------------


def grid_of(site: Site, align: int) -> Grid:
    """The counts at which a site is timed: at most `POINTS`, the dense one among them, aligned where the axis is."""
    axes, most = [site.outer.name, site.inner.name], site.sizes[site.outer.name]
    if not site.active:
        return Grid(axes, [1], [1])
    inner = site.inner.step
    each = evenly([*range(inner, site.share, inner), site.share], 3)
    step = align if site.outer.aligned else 1
    counts = [count for count in (*range(step, most, step), most) if count >= site.routed]
    return Grid(axes, evenly(counts, POINTS // len(each)), each)


def _first(site: Site, groups: int, each: int) -> list[int]:
    """The first units of a site, so many in each of the first units of its outer axis."""
    return [group * site.share + unit for group in range(groups) for unit in range(each)]


def _stand_ins(model: nn.Module, anatomy: Anatomy) -> dict[Where, Site]:
    """For every site that runs, the one that is timed in its place: the same site of the first layer of those sizes."""
    sizes: dict[str, list[tuple[Any, ...]]] = {}
    for site in anatomy.sites:
        sizes.setdefault(site.path, []).append((site.kind, *site.sizes.items(), *site.shapes.items()))
    first: dict[Any, Site] = {}
    return {
        site.key: first.setdefault(
            (site.stack, site.kind, type(model.get_submodule(site.path)), tuple(sizes[site.path])), site
        )
        for site in anatomy.sites
        if site.active
    }


# --- measuring -------------------------------------------------------------------------------------------------------


def _walk(dense: Bench, site: Site, grid: Grid) -> np.ndarray:
    """Seconds of the layer at every count, [G, E] as in table.py, from the largest count down on one copy of it."""
    seconds = np.empty((len(grid.groups), len(grid.each)))
    for j, each in enumerate(grid.each):
        bench, now = dense.copy(), site
        for i, groups in reversed(list(enumerate(grid.groups))):
            bench, now = bench.cut(now, groups, each)
            seconds[i, j] = bench.seconds()
    return seconds


def measured_table(
    model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, grids: Mapping[Where, Grid]
) -> LatencyTable:
    """Time a model and its layers now, at the counts of `grids`. The model is as before afterwards.

    Raises:
        ValueError: `sequence_length` is more than the model has positions for.
    """
    same = _stand_ins(model, anatomy)
    distinct = {site.key: site for site in same.values()}
    whole: list[float] = []
    walks: dict[Where, list[np.ndarray]] = {key: [] for key in distinct}
    with quiet(model), torch.inference_mode():
        inputs = inputs_of(model, anatomy, config)
        benches = {key: Bench.of(model, site, inputs) for key, site in distinct.items()}
        for _ in tqdm(range(WARMUP + ROUNDS), desc="latency of the layers", leave=False):
            whole.append(timed(model, **inputs))
            for key, site in distinct.items():
                walks[key].append(_walk(benches[key], site, grids[key]))
        medians = {key: monotone(np.median(rounds[WARMUP:], axis=0)) for key, rounds in walks.items()}
        alone = {key: medians[stand_in.key] for key, stand_in in same.items()}
        *levels, (_, shallow) = _levels(model, anatomy, grids, alone, inputs)
    gone = sum(map(len, _half(anatomy).values()))
    bare = max(levels[-1][1] - shallow, 0.0) / gone if gone else 0.0
    dense = statistics.median(whole[WARMUP:])
    ms = {site.key: alone.get(site.key, np.zeros((1, 1))) for site in anatomy.sites}
    return replace(table_of(1000 * dense, ms, levels, grids, bare), spread=dense / min(whole[WARMUP:]))


def _levels(
    model: PreTrainedModel,
    anatomy: Anatomy,
    grids: Mapping[Where, Grid],
    alone: Mapping[Where, np.ndarray],
    inputs: Inputs,
) -> Iterator[Level]:
    """What the whole model takes with all sites at each of `LEVELS`, and at the last with half of the layers.

    The copies of its layers shrink from level to level, so that at most the first level's share of the layers is held
    beside the model.
    """
    sites = {site.key: site for site in anatomy.sites if site.active}
    layers: dict[str, nn.Module] = {}
    most = sum(float(seconds[-1, -1] - seconds[0, 0]) for seconds in alone.values())
    for level in tqdm(LEVELS, desc="latency of the model", leave=False):
        saved = 0.0
        for path in dict.fromkeys(site.path for site in sites.values()):
            if path not in layers:
                layers[path] = copy.deepcopy(model.get_submodule(path))
            for key, site in sites.items():
                if site.path == path:
                    i, j = (round(level * (len(counts) - 1)) for counts in (grids[key].groups, grids[key].each))
                    groups, each = grids[key].groups[i], grids[key].each[j]
                    cut_(layers[path], site, site.inner.name, _first(site, groups, each))
                    sites[key] = site.resized(site.counts(groups, each))
                    saved += float(alone[key][-1, -1] - alone[key][i, j])
        yield saved / max(most, TINY), _share(model, layers, {}, inputs)
    yield 1.0, _share(model, layers, {anatomy.extent(*where): gone for where, gone in _half(anatomy).items()}, inputs)


def _half(anatomy: Anatomy) -> dict[Where, list[int]]:
    """Every other layer of each stack that layers can go from."""
    stacks = (extent for extent in anatomy.extents if extent.path and extent.axis.config)
    return {extent.where: list(range(1, extent.of, 2)) for extent in stacks}


def _share(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], gone: Mapping[Extent, Sequence[int]], inputs: Inputs
) -> float:
    """Of the dense model's time, what it takes with other layers, some of them gone: the median of passes in turn."""
    ratios = []
    for _ in range(WARMUP + LEVEL_ROUNDS):
        dense = timed(model, **inputs)
        with swapped(model, layers), contextlib.ExitStack() as stack:
            for extent, missing in gone.items():
                kept = [index for index in range(extent.of) if index not in missing]
                stack.enter_context(without_layers(model, extent, kept))
            ratios.append(timed(model, **inputs) / dense)
    return statistics.median(ratios[WARMUP:])


@contextlib.contextmanager
def swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other layers at these paths; its own are back afterwards."""
    own = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            _set(model, path, layer)
        yield
    finally:
        for path, layer in own.items():
            _set(model, path, layer)


def _set(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def inputs_of(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> Inputs:
    """The arguments that the model is timed with: random tokens at `latency_batch_size` x `sequence_length`.

    Raises:
        ValueError: `sequence_length` is more than the model has positions for; a model of sound.
    """
    if model.main_input_name not in READ:
        raise ValueError(
            f"metric='latency' times a model on random {' or '.join(READ)}, and this {anatomy.model_type} reads "
            f"{model.main_input_name}. Use metric='macs'."
        )
    limit = positions(model)
    if anatomy.image_tokens is None and limit and config.sequence_length > limit:
        raise ValueError(
            f"sequence_length={config.sequence_length}: metric='latency' runs the model at that length, and this "
            f"{anatomy.model_type} has {limit} positions. Set sequence_length to at most {limit}."
        )
    inputs = random_inputs(model, config.latency_batch_size, config.sequence_length)
    return forward_inputs(model, Batch(inputs, {}, torch.empty(0)))


def against(bench: Bench, model: PreTrainedModel, inputs: Inputs, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a model, and the median of its time over the bench's, timed in turn."""
    pairs = [(timed(model, **inputs), bench.seconds()) for _ in range(WARMUP + rounds)][WARMUP:]
    return 1000 * statistics.median(whole for whole, _ in pairs), statistics.median(a / b for a, b in pairs)
