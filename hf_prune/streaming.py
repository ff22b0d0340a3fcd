"""prune_checkpoint(): from files to files, for a checkpoint that is larger than memory.

Only the order of calls is here. accelerate loads each module's weights from the safetensors files for its pass, `prune`
cuts them where they lie, and `save_pretrained` writes shard by shard.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules

from .checkpoint.directory import path_of, refuse_full, scratch
from .checkpoint.save import save_pretrained
from .checkpoint.shards import check_unchanged, shards_of, states
from .config import PruningConfig, config_or
from .data.opening import load_config, load_model
from .model.memory import given_back
from .model.offload import not_on_disk, streamed_to
from .oneshot import PruneResult, prune
from .plan import PruningPlan, must_be_plan

SHARD = "1GB"  # of the result; its weights are read from their files while it is written


def prune_checkpoint(
    source: str | os.PathLike[str],
    data: Any,
    config: PruningConfig | None = None,
    *,
    out: str | os.PathLike[str],
    processing_class: Any = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    vocabulary: Any = None,
    plan: PruningPlan | None = None,
    guard: Any = None,
    task: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    overwrite: bool = False,
    remote_code: bool = False,
    max_shard_size: str = SHARD,
) -> PruneResult:
    """Prune a checkpoint from file to file: plan and weights are those of `prune`, the model is never whole in memory.

    What is in memory at once: the weights of one layer, or the embeddings; the activations of one batch; and a few
    square matrices in fp32 as wide as a layer's FFN, which dominate where that is wide (14336 neurons: 0.8 GB each).
    Experts that transformers fuses on loading are split again in memory, one shard of the result at a time.
    Calibration states beyond the size of the largest weight lie in a file in TMPDIR.

    On the disk of `out` there must be room for twice the result, and for the source where experts are fused: these and
    the weights that are cut lie in a temporary directory beside `out`, `.hf_prune-*-stream`. It is removed at the end,
    also after an error or an interrupt. A killed run leaves it, and `.hf_prune-*` if it was saving; the next run beside
    it removes both, and gives the bytes that the killed one would have given.

    Args:
        source: a directory with safetensors, or a Hub id. It is read and never written to.
        out: the directory to save to, with proof (see `save_pretrained`). It must be empty, or not there yet.
        data, config, processing_class, data_collator, vocabulary, plan, guard: see `prune`. `processing_class` is
            saved beside the weights.
        task: which head to open, as in `hf-prune prune --task`. Default: the class that config.json names.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights in passes and of the result. Default: as saved.
        device: where a layer computes.
        overwrite: replace an `out` that is not empty.
        remote_code, max_shard_size: see `save_pretrained`.

    Returns:
        As from `prune`, but the weights of its model are on the meta device: open `out` for them. The report has the
        proof as `difference`, what `save_pretrained` returns.

    Raises:
        FileExistsError: `out` is not empty. FileNotFoundError: no such source, a shard is missing, or there are no
            safetensors. OSError: no room on the disk of `out`. ValueError: a truncated shard; quantised weights; a
            latency target (it times the model, which needs it in memory); what `prune` and `save_pretrained` refuse.
        RuntimeError: the source changed meanwhile, or the result does not reload. Nothing is saved then.
    """
    target = refuse_full(out, overwrite)
    config = _checked(config, plan)
    name, on = os.fspath(source), _device(device)
    shards = checked_shards(name, revision, target)
    before = states(shards)
    _check_room(target, 2 * (config.keep if plan is None else plan.cost.get("keep", 1.0)) * _bytes(shards))
    with scratch(target) as folder:
        model = _opened(name, task, on, folder, {"revision": revision, "dtype": dtype})
        result = prune(
            model,
            data,
            config,
            processing_class=processing_class,
            data_collator=data_collator,
            vocabulary=vocabulary,
            plan=plan,
            guard=guard,
        )
        check_unchanged(before)
        _check_room(target, sum(p.numel() * p.element_size() for p in model.parameters()))
        with given_back():
            result.report["difference"] = save_pretrained(
                model,
                target,
                processing_class=result.processing_class,
                overwrite=overwrite,
                remote_code=remote_code,
                max_shard_size=max_shard_size,
            )
        remove_hook_from_submodules(model)
    return result


# --- before anything is written --------------------------------------------------------------------------------------


def _checked(config: PruningConfig | None, plan: PruningPlan | None) -> PruningConfig:
    """What to prune by.

    Raises:
        ValueError: latency is measured on a model in memory. TypeError: another object than asked for.
    """
    if plan is not None:
        must_be_plan(plan)
    config = config_or(config, lambda: PruningConfig() if plan is None else PruningConfig.from_dict(plan.config))
    if "latency" in (config.metric, None if plan is None else plan.config.get("metric")):
        raise ValueError(
            "metric='latency' times the model, which must be whole in memory for that, and this one is read from its "
            "files. Take metric='macs' or 'params', or prune() on a machine that holds it."
        )
    return config


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type == "meta":
        raise ValueError(f"device={device!r} computes nothing here. Give 'cpu', 'cuda' or 'cuda:1', say.")
    return found


def checked_shards(name: str, revision: str | None, out: Path) -> list[Path]:
    """The source's weight files, if it can be pruned from file to file; nothing is opened but their headers.

    Raises:
        FileNotFoundError: no such source, or it lacks a file. ValueError: it is `out`, quantised, or damaged.
    """
    name, config = load_config(name, revision)
    if os.path.isdir(name) and path_of(name) == path_of(out):
        raise ValueError(f"{name!r} is both the source and `out`. Save to another directory.")
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name!r} is quantised, and packed weights cannot be pruned. Give the checkpoint that it was made from, "
            "and quantise the result again."
        )
    return shards_of(name, revision)


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _check_room(target: Path, needed: float) -> None:
    """Raise OSError where a disk has less room than this many bytes."""
    home = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise OSError(
            f"{os.fspath(home)!r} has {free / 1e9:.3g} GB left, and pruning into {target.name!r} takes about "
            f"{needed / 1e9:.3g} GB there. Make room, or save to another disk."
        )


def _opened(name: str, task: str | None, device: torch.device, folder: Path, options: Mapping[str, Any]) -> Any:
    """The model with its weights in files, each module's loaded to a device for its pass.

    Raises:
        ValueError: the source lacks some of its weights. What `load_model` raises.
    """
    with _quiet():
        model = load_model(name, task, device_map={"": "disk"}, offload_folder=os.fspath(folder), **options)
        lacking = not_on_disk(model)
        if lacking:
            raise ValueError(
                f"{name!r} lacks {lacking[0]} ({len(lacking)} weights that a {type(model).__name__} has). Open it as "
                "what it was saved as (task=, --task), or train it as this class first."
            )
        return streamed_to(device, model)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without accelerate's note that weights are offloaded, which was asked for."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
