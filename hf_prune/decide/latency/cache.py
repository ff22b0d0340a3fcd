"""Measured tables on disk: a table is measured once for a device, a model and a setting, and read ever after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...config import PruningConfig
from ...files import write_text
from ...model.anatomy import Anatomy
from ...plan import Where
from .clock import grid_of, measured_table
from .table import Grid, LatencyTable, MeasuredCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 3
BUSY = 1.25  # median over fastest dense pass, beyond which a table is used with a warning and not cached


def latency_table(model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, align: int) -> LatencyTable:
    """The table of a model on its device, from the cache or measured now. The model is not changed.

    Raises:
        ValueError: `sequence_length` is more than the model has positions for.
    """
    grids = {site.key: grid_of(site, align) for site in anatomy.sites}
    key = _key(model, anatomy, config, grids)
    path = _path(key)
    found = _read(path, key, grids)
    if found is None:
        found = measured_table(model, anatomy, config, grids)
        _keep(path, key, found)
    return found


# --- the key ---------------------------------------------------------------------------------------------------------


def _key(
    model: PreTrainedModel, anatomy: Anatomy, config: PruningConfig, grids: Mapping[Where, Grid]
) -> dict[str, Any]:
    """All that a measured table depends on, in types that JSON gives back as they were."""
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
        "sites": [[*site.key, dict(site.sizes), site.columns, site.active] for site in anatomy.sites],
        "grids": [[grid.axes, grid.groups, grid.each] for grid in grids.values()],
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
    """The name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cache_directory() -> Path:
    """Where the tables lie: HF_PRUNE_CACHE, else ~/.cache/hf_prune."""
    root = os.environ.get("HF_PRUNE_CACHE") or Path.home() / ".cache" / "hf_prune"
    return Path(root) / "latency"


def _path(key: Mapping[str, Any]) -> Path:
    return cache_directory() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


# --- reading and writing ---------------------------------------------------------------------------------------------


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
    layers = [[*place, ms] for place, ms in table.layers.items()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"format": FORMAT, "key": key, "fixed_ms": table.fixed, "sites": sites, "layers": layers}
        write_text(path, json.dumps(found))
    except OSError as error:
        warnings.warn(f"The latency table is not cached ({error}); set HF_PRUNE_CACHE.", stacklevel=2)


def _read(path: Path, key: Mapping[str, Any], grids: Mapping[Where, Grid]) -> LatencyTable | None:
    """What `_write` wrote for the same key; None for anything else."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        data = json.loads(path.read_text())
        units = {(stack, layer, kind): MeasuredCost(**cost) for stack, layer, kind, cost in data["sites"]}
        fits = all(
            (cost.axes, cost.groups, cost.each) == (grids[place].axes, grids[place].groups, grids[place].each)
            and np.shape(cost.ms) == (len(cost.groups), len(cost.each))
            and np.isfinite(cost.ms).all()
            for place, cost in units.items()
        )
        fixed = float(data["fixed_ms"])
        known = data["format"] == FORMAT and data["key"] == key and units.keys() == grids.keys()
        if known and fits and math.isfinite(fixed):
            layers = {(stack, layer): float(ms) for stack, layer, ms in data["layers"]}
            return LatencyTable("latency", fixed, units, layers, cached=True)
    return None
