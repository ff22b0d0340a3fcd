"""What a model costs in the flesh: parameters, multiply-adds, bytes on disk, and measured latency.

Latency is wall-clock time of whole forward passes over unpadded random inputs. Several models are measured in turn
(one run each, round after round), so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..anatomy import describe, quiet
from ..costs import dense_counts
from ..costs import report as cost_report
from ..latency import random_inputs, timed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measurable = Any  # a model in memory, or the directory of one
Shape = tuple[int, int]  # (batch, length)


def measure(
    model: Measurable,
    *,
    shapes: Sequence[Shape] = ((1, 128), (32, 128)),
    sequence_length: int = 128,
    runs: int = 20,
    warmup: int = 3,
) -> dict[str, Any]:
    """Size and speed of one model, or of the directory of one.

    Args:
        shapes: (batch, length) pairs to time; empty to time nothing. Vision models take the length from the image.
        sequence_length: tokens per example at which MACs are counted.
        runs: timed passes per shape, after `warmup` untimed ones.

    Returns:
        A plain dict: parameters, block_parameters, macs, block_macs, sequence_length, bytes (of a directory, else
        None), latency (one entry per shape: batch, length, median_ms, p90_ms, runs) and settings (dtype, device,
        threads, attention, torch, transformers).

    Raises:
        ValueError: unknown family, quantised weights.
    """
    return compare({"model": model}, shapes=shapes, sequence_length=sequence_length, runs=runs, warmup=warmup)["model"]


def compare(
    models: Mapping[str, Measurable],
    *,
    shapes: Sequence[Shape] = ((1, 128), (32, 128)),
    sequence_length: int = 128,
    runs: int = 20,
    warmup: int = 3,
) -> dict[str, dict[str, Any]]:
    """`measure` of several models in turn; each latency entry also gives its `speedup` over the first model."""
    opened = {name: _open(model) for name, model in models.items()}
    rows = {name: _size(opened[name], model, sequence_length) for name, model in models.items()}
    with ExitStack() as quieted, torch.inference_mode():
        for model in opened.values():
            quieted.enter_context(quiet(model))
        for batch, length in shapes:
            times = _interleaved(opened, batch, length, runs, warmup)
            first = statistics.median(next(iter(times.values())))
            for name, seconds in times.items():
                rows[name]["latency"].append(_latency(seconds, batch, length, first))
    return rows


def _open(model: Measurable) -> PreTrainedModel:
    if not isinstance(model, str | os.PathLike):
        return model
    from ..data import load_model

    return load_model(os.fspath(model))


def _size(model: PreTrainedModel, given: Measurable, sequence_length: int) -> dict[str, Any]:
    import transformers

    anatomy = describe(model)
    cost = cost_report(anatomy, dense_counts(anatomy), sequence_length)
    return {
        "parameters": int(cost["params_model"]),
        "block_parameters": int(cost["params_blocks"]),
        "macs": int(cost["macs_model"]),
        "block_macs": int(cost["macs_blocks"]),
        "sequence_length": anatomy.tokens(sequence_length),
        "bytes": directory_bytes(given) if isinstance(given, str | os.PathLike) else None,
        "latency": [],
        "settings": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def directory_bytes(directory: str | os.PathLike[str]) -> int:
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def _interleaved(
    models: Mapping[str, PreTrainedModel], batch: int, length: int, runs: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each timed pass. Every round starts with another model."""
    inputs = {name: random_inputs(model, batch, length) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for turn in tqdm(range(warmup + runs), desc=f"latency, batch {batch}", leave=False):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            taken = _timed(models[name], inputs[name])
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def _timed(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> float:
    return timed(model, **inputs)


def _latency(seconds: Sequence[float], batch: int, length: int, first: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    p90 = sorted(seconds)[min(len(seconds) - 1, int(0.9 * len(seconds)))]
    return {
        "batch": batch,
        "length": length,
        "median_ms": 1000 * median,
        "p90_ms": 1000 * p90,
        "runs": len(seconds),
        "speedup": first / median,
    }
