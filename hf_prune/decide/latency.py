"""What a forward pass costs on this device, measured: one layer of each kind is timed at a grid of counts.

A site's saving at a count is that of its layer, timed alone with all else dense. A layer alone finds its weights in the
processor's caches and a model does not, so the whole model is timed too, with every site at a few shares of its counts,
and savings are scaled to that. So the dense total is the measured one, and savings add up. All is timed in turn, round
after round, and medians are kept; the table is cached per device and setting.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..model import layerwise
from ..model.anatomy import Anatomy, positions, probe_inputs, quiet
from ..model.batches import Batch, forward_inputs
from ..config import PruningConfig
from .costs import CostModel
from ..files import write_text
from ..plan import PruningPlan, SiteKey
from ..model.sites import Site
from ..model.cut import cut_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 2
POINTS = 12  # counts timed per site, at most
ROUNDS, WARMUP = 15, 1  # over all counts and the dense model
LEVELS, LEVEL_ROUNDS = (2 / 3, 1 / 3, 0.0), 9  # shares of the counts at which the whole model is timed, descending
PASSES, SHORT = 3, 0.01  # timed in a row at each count after one that warms up; one where a pass takes these seconds
WATCH_ROUNDS = 15  # before and after a cut
BUSY = 1.25  # median over fastest dense pass, beyond which a table is used with a warning and not cached
TOLERANCE = 0.1  # of the asked fraction, beyond which a cut that missed it warns
Inputs = dict[str, Any]
Level = tuple[float, float]  # of what the sites alone can save, the part saved; of the dense pass, the part still taken


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeasuredCost:
    """Milliseconds of one site at (KV groups or neurons) x (query heads a group, or 1), linear in between."""

    groups: list[int]
    each: list[int]
    ms: list[list[float]]  # [groups][each]

    def site(self, units: int, kv_heads: int) -> float:
        groups, each = (kv_heads, units / kv_heads) if kv_heads else (units, 1)
        columns = [np.interp(groups, self.groups, column) for column in zip(*self.ms, strict=True)]
        return float(np.interp(each, self.each, columns))


@dataclass(frozen=True)
class LatencyTable(CostModel):
    """Milliseconds of every site at every count, and whether they come from the cache."""

    cached: bool = False
    spread: float = 1.0  # of the dense passes: median over fastest

    @property
    def source(self) -> str:
        return "cache" if self.cached else "measured"


def latency_table(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, align: int) -> LatencyTable:
    """The table of a model on its device, from the cache or measured now. The model is not changed.

    Raises:
        ValueError: `sequence_length` is more than the model has positions for.
    """
    grids = {site.key: _grid(site, align) for site in anatomy.sites}
    key = _key(model, anatomy, config, grids)
    path = _cache_path(key)
    found = _read(path, key, grids)
    if found is None:
        found = _measure(model, anatomy, config, grids)
        _keep(path, key, found)
    return found


def _check_length(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> None:
    limit = positions(model)
    if anatomy.image_tokens is None and limit and config.sequence_length > limit:
        raise ValueError(
            f"sequence_length={config.sequence_length}: metric='latency' runs the model at that length, and this "
            f"{anatomy.model_type} has {limit} positions. Set sequence_length to at most {limit}."
        )


@dataclass(frozen=True)
class Grid:
    """The counts at which a site is timed, ascending: KV groups or neurons, and query heads a group (or 1)."""

    groups: list[int]
    each: list[int]


def _grid(site: Site, align: int) -> Grid:
    if not site.active:
        return Grid([1], [1])
    if not site.is_attention:
        return Grid(_spread([*range(align, site.columns, align), site.columns], POINTS), [1])
    each = _spread(range(1, site.heads // site.kv_heads + 1), 3)
    return Grid(_spread(range(1, site.kv_heads + 1), POINTS // len(each)), each)


def _spread(values: Sequence[int], points: int) -> list[int]:
    """At most `points` of the values, evenly, with both ends."""
    return [values[i] for i in sorted({round(i) for i in np.linspace(0, len(values) - 1, points)})]


# --- measuring -------------------------------------------------------------------------------------------------------


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Unpadded random tokens of exactly `length` (or images), the same on every call."""
    generator = torch.Generator().manual_seed(0)
    inputs = probe_inputs(model, length, batch)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = torch.randn(value.shape, generator=generator).to(value)
        elif name.endswith("input_ids"):
            tokens = torch.randint(model.config.vocab_size, value.shape, generator=generator).to(value)
            inputs[name] = torch.cat([tokens[:, :-1], value[:, -1:]], 1)  # the last stays: BART's classifier needs it
    return inputs


def timed(module: nn.Module, *args: Any, **kwargs: Any) -> float:
    """Seconds of one forward pass."""
    device = next(module.parameters()).device
    synchronize(device)
    started = time.perf_counter()
    module(*args, **kwargs)
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Bench:
    """A layer and what the model calls it with."""

    layer: nn.Module
    hidden: torch.Tensor
    kwargs: Inputs

    @classmethod
    def of(cls, model: nn.Module, site: Site, inputs: Inputs) -> Bench:
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
        """The same with the layer cut, in place, to the first units of one site; and that site as it is now."""
        left = _cut_first_(self.layer, site, groups, each)
        handed_on = getattr(site.row, "head_argument", None)
        kwargs = {k: v[:, : left.heads] if k == handed_on and v is not None else v for k, v in self.kwargs.items()}
        return replace(self, kwargs=kwargs), left


def _cut_first_(layer: nn.Module, site: Site, groups: int, each: int) -> Site:
    """Cut a layer to the first units of one site, neurons or KV groups with query heads; the site as it is now."""
    if not site.is_attention:
        cut_(layer, site, "neuron", range(groups))
        return replace(site, columns=groups)
    share, heads = site.heads // site.kv_heads, groups * each
    cut_(layer, site, "head", [g * share + i for g in range(groups) for i in range(each)])
    return replace(site, columns=heads * site.head_dim, heads=heads, kv_heads=groups)


def _walk(dense: Bench, site: Site, grid: Grid) -> np.ndarray:
    """Seconds of the layer at every count [groups, each], from the largest down on one copy of it."""
    seconds = np.empty((len(grid.groups), len(grid.each)))
    for j, each in enumerate(grid.each):
        bench, now = dense.copy(), site
        for i, groups in reversed(list(enumerate(grid.groups))):
            bench, now = bench.cut(now, groups, each)
            seconds[i, j] = bench.seconds()
    return seconds


def _stand_ins(model: nn.Module, anatomy: Anatomy) -> dict[SiteKey, Site]:
    """For every site that runs, the one that is timed in its place: that of the first layer just like its own."""
    sizes: dict[str, list[tuple[Any, ...]]] = {}
    for site in anatomy.sites:
        sizes.setdefault(site.path, []).append((site.kind, site.columns, site.heads, site.kv_heads, site.unit_params))
    first: dict[Any, Site] = {}
    return {
        site.key: first.setdefault(
            (site.stack, site.kind, type(model.get_submodule(site.path)), tuple(sizes[site.path])), site
        )
        for site in anatomy.sites
        if site.active
    }


def _measure(
    model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, grids: Mapping[SiteKey, Grid]
) -> LatencyTable:
    same = _stand_ins(model, anatomy)
    distinct = {site.key: site for site in same.values()}
    whole: list[float] = []
    walks: dict[SiteKey, list[np.ndarray]] = {key: [] for key in distinct}
    with quiet(model), torch.inference_mode():
        inputs = _inputs(model, anatomy, config)
        benches = {key: Bench.of(model, site, inputs) for key, site in distinct.items()}
        for _ in tqdm(range(WARMUP + ROUNDS), desc="latency of the layers", leave=False):
            whole.append(timed(model, **inputs))
            for key, site in distinct.items():
                walks[key].append(_walk(benches[key], site, grids[key]))
        medians = {key: monotone(np.median(rounds[WARMUP:], axis=0)) for key, rounds in walks.items()}
        alone = {key: medians[stand_in.key] for key, stand_in in same.items()}
        levels = list(_levels(model, anatomy, grids, alone, inputs))
    dense = statistics.median(whole[WARMUP:])
    ms = {site.key: alone.get(site.key, np.zeros((1, 1))) for site in anatomy.sites}
    return replace(_table(1000 * dense, ms, levels, grids), spread=dense / min(whole[WARMUP:]))


def _levels(
    model: PreTrainedModel,
    anatomy: Anatomy,
    grids: Mapping[SiteKey, Grid],
    alone: Mapping[SiteKey, np.ndarray],
    inputs: Inputs,
) -> Iterator[Level]:
    """The whole model with all sites at a level's share of their counts.

    The copies of its layers shrink from level to level: at most the first level's share is held beside the model.
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
                    sites[key] = _cut_first_(layers[path], site, grids[key].groups[i], grids[key].each[j])
                    saved += float(alone[key][-1, -1] - alone[key][i, j])
        ratios = []
        for _ in range(WARMUP + LEVEL_ROUNDS):
            dense = timed(model, **inputs)
            with swapped(model, layers):
                ratios.append(timed(model, **inputs) / dense)
        yield saved / max(most, 1e-30), statistics.median(ratios[WARMUP:])


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


def _inputs(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> Inputs:
    _check_length(model, anatomy, config)
    inputs = random_inputs(model, config.latency_batch_size, config.sequence_length)
    return forward_inputs(model, Batch(inputs, {}, torch.empty(0)))


def _table(
    dense_ms: float, alone: Mapping[SiteKey, np.ndarray], levels: Sequence[Level], grids: Mapping[SiteKey, Grid]
) -> LatencyTable:
    """The table whose sites share the time of a model as their layers do alone, and sum up to it at every level.

    Args:
        alone: seconds of a site's layer at every count of the site, [groups, each], never less for more.
        levels: see `_levels`.
    """
    savings = {key: seconds - seconds[0, 0] for key, seconds in alone.items()}
    most = max(sum(float(seconds[-1, -1]) for seconds in savings.values()), 1e-30)
    kept = [*(1 - saved for saved, _ in reversed(levels)), 1.0]
    takes = np.maximum.accumulate([*(taken for _, taken in reversed(levels)), 1.0]).clip(max=1.0)
    units = {}
    for key, seconds in savings.items():
        whole = float(seconds[-1, -1])
        curve = np.interp(seconds / max(whole, 1e-30), kept, takes - takes[0])
        units[key] = MeasuredCost(grids[key].groups, grids[key].each, (dense_ms * whole / most * curve).tolist())
    return LatencyTable("latency", dense_ms * float(takes[0]), units)


def monotone(ms: np.ndarray) -> np.ndarray:
    """The mean of the least non-decreasing table above the measured one and the greatest below it."""
    above, below = ms, ms
    for axis in range(ms.ndim):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2


# --- the cache -------------------------------------------------------------------------------------------------------


def _key(
    model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, grids: Mapping[SiteKey, Grid]
) -> dict[str, Any]:
    """All that a measured table depends on, as JSON gives it back."""
    import transformers

    return {
        **setting(model, anatomy, config),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "class": type(model).__name__,
        "model_type": anatomy.model_type,
        "hidden_size": anatomy.hidden_size,
        "parameters": anatomy.total_params,
        "sites": [[*site.key, site.columns, site.heads, site.kv_heads, site.active] for site in anatomy.sites],
        "grids": [[grid.groups, grid.each] for grid in grids.values()],
    }


def setting(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> dict[str, Any]:
    """Where and at which shape latency is measured."""
    return {
        "batch": config.latency_batch_size,
        "length": anatomy.tokens(config.sequence_length),
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_directory() -> Path:
    root = os.environ.get("HF_PRUNE_CACHE") or Path.home() / ".cache" / "hf_prune"
    return Path(root) / "latency"


def _cache_path(key: Mapping[str, Any]) -> Path:
    return cache_directory() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def _keep(path: Path, key: Mapping[str, Any], table: LatencyTable) -> None:
    """Cache a table that can be trusted."""
    if table.spread <= BUSY:
        _write(path, key, table)
        return
    warnings.warn(
        f"The machine is busy: passes of the dense model took {table.spread:.2f} times the fastest one (median). The "
        "latency table is used this once and not cached; repeat on a quiet machine.",
        stacklevel=4,
    )


def _write(path: Path, key: Mapping[str, Any], table: LatencyTable) -> None:
    """A cache that cannot be written costs the next run its time, not this one its result."""
    sites = [[*place, vars(cost)] for place, cost in table.units.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, "key": key, "fixed_ms": table.fixed, "sites": sites}))
    except OSError as error:
        warnings.warn(f"The latency table is not cached ({error}); set HF_PRUNE_CACHE.", stacklevel=2)


def _read(path: Path, key: Mapping[str, Any], grids: Mapping[SiteKey, Grid]) -> LatencyTable | None:
    """What `_write` wrote for the same key; None for anything else."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        data = json.loads(path.read_text())
        units = {(stack, layer, kind): MeasuredCost(**cost) for stack, layer, kind, cost in data["sites"]}
        fits = all(
            (cost.groups, cost.each) == (grids[place].groups, grids[place].each)
            and np.shape(cost.ms) == (len(cost.groups), len(cost.each))
            and np.isfinite(cost.ms).all()
            for place, cost in units.items()
        )
        fixed = float(data["fixed_ms"])
        known = data["format"] == FORMAT and data["key"] == key and units.keys() == grids.keys()
        if known and fits and math.isfinite(fixed):
            return LatencyTable("latency", fixed, units, cached=True)
    return None


# --- before and after a cut ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watch:
    """Times a model before and after its cut, each against a copy of one dense layer, so that a drift cancels."""

    clock: Bench
    inputs: Inputs
    setting: dict[str, Any]
    dense_ms: float
    ratio: float  # dense model over clock

    @classmethod
    def start(cls, model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig) -> Watch:
        with quiet(model), torch.inference_mode():
            inputs = _inputs(model, anatomy, config)
            site = next(site for site in anatomy.sites if site.active)
            clock = Bench.of(model, site, inputs).copy()
            return cls(clock, inputs, setting(model, anatomy, config), *_against(clock, model, inputs))

    def stop(self, model: PreTrainedModel, plan: PruningPlan) -> dict[str, Any]:
        """The realised latency of the model as it is now, at the speed that the machine had at the start."""
        with quiet(model), torch.inference_mode():
            _, ratio = _against(self.clock, model, self.inputs)
        keep, predicted = ratio / self.ratio, plan.cost.get("keep")
        _warn_if_missed(plan.config.get("keep", predicted), predicted, keep)
        return {
            "keep": keep,
            "dense_ms": self.dense_ms,
            "predicted_ms": None if predicted is None else predicted * self.dense_ms,
            "realised_ms": keep * self.dense_ms,
            **self.setting,
        }


def _against(clock: Bench, model: PreTrainedModel, inputs: Inputs) -> tuple[float, float]:
    """Median milliseconds of a model, and the median of its time over the clock's, timed in turn."""
    pairs = [(timed(model, **inputs), clock.seconds()) for _ in range(WARMUP + WATCH_ROUNDS)][WARMUP:]
    return 1000 * statistics.median(whole for whole, _ in pairs), statistics.median(a / b for a, b in pairs)


def _warn_if_missed(asked: float | None, predicted: float | None, realised: float) -> None:
    if asked is None or predicted is None:
        return
    if predicted * (1 - TOLERANCE) <= realised <= asked * (1 + TOLERANCE):
        return
    slower = " (slower than the dense model)" if realised > 1 else ""
    warnings.warn(
        f"keep={asked:g} of the latency was asked, {predicted:.3f} predicted and {realised:.3f} realised{slower}: the "
        "machine may have been busy now or when its table was measured. Repeat on a quiet machine, after clearing "
        f"{cache_directory()}.",
        stacklevel=4,
    )
