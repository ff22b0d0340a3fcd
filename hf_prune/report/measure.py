"""What a model costs: parameters, multiply-adds, bytes on disk and in memory, and measured latency.

Latency is wall-clock time over unpadded random inputs: a forward pass, and for models that generate the prefill of a
prompt and each token after it. Several models are measured in turn (one run each, round after round), so that a machine
that slows down slows all of them.
"""

from __future__ import annotations

import inspect
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from tqdm.auto import tqdm

from ..checkpoint.proof import weights_id
from ..decide.costs import report as cost_report
from ..decide.latency.cache import device_name
from ..decide.latency.clock import timed
from ..decide.units import default_align
from ..model.anatomy import Anatomy, describe
from ..model.offload import check_in_memory, device_of
from ..model.probe import cache_argument, positions, random_inputs
from ..model.weights import quiet
from .resident import footprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measurable = Any  # a model in memory, or the directory of one
NOT_MODEL = ("checkpoint-", "runs", "pictures", "measurements", ".")  # how names begin that are no part of a model
Shape = tuple[int, int]  # (batch, length)
Clock = Callable[[], dict[str, float]]  # one run: seconds by what was timed


def measure(model: Measurable, **options: Any) -> dict[str, Any]:
    """Size and speed of one model, or of the directory of one.

    Args:
        options: those of `compare`.

    Returns:
        A plain dict: parameters, block_parameters, macs, block_macs, sequence_length, kv_cache_bytes (a token; None
        where nothing is generated), latency (see `compare`), notes, settings (dtype, device, threads, attention, torch,
        transformers), and of a directory bytes, load_seconds, resident_bytes (else None) and weights (their name, see
        `checkpoint.proof.weights_id`).

    Raises:
        ValueError: unknown family, quantised weights.
    """
    return compare({"model": model}, **options)["model"]


def compare(
    models: Mapping[str, Measurable],
    *,
    shapes: Sequence[Shape] = ((1, 128), (32, 128)),
    sequence_length: int = 128,
    runs: int = 20,
    warmup: int = 3,
    new_tokens: int = 0,
    compiled: bool = False,
) -> dict[str, dict[str, Any]]:
    """`measure` of several models in turn.

    Args:
        shapes: (batch, length) pairs to time; empty to time nothing. Vision models take the length from the image.
        sequence_length: tokens per example at which MACs are counted.
        runs: timed runs per shape, after `warmup` untimed ones.
        new_tokens: where all of the models generate, the prefill and this many tokens after it are timed as well.
        compiled: forward passes are timed under torch.compile as well.

    Returns:
        By name what `measure` returns. Each latency entry says what was timed (forward, compiled forward, prefill, or
        decode: one token after `length` others), batch, length, runs, median_ms, p90_ms, p99_ms, tokens_per_second and
        its `speedup` over the first model.

    Raises:
        ValueError: unknown family, quantised weights, or offloaded ones to be timed; a shape longer than a model's
            positions; no runs.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: at least one is timed. To time nothing, give no shapes.")
    opened = {name: _open(model) for name, model in models.items()}
    for model in opened.values() if shapes else ():
        check_in_memory(model, "Latency is measured")
    new_tokens = new_tokens if all(_generates(model) for model in opened.values()) else 0  # what all of them do
    for name, model in opened.items():
        _check_length(name, model, [length + new_tokens for _, length in shapes])
    rows = {name: _size(opened[name], model, sequence_length) for name, model in models.items()}
    with ExitStack() as quieted, torch.inference_mode():
        for model in opened.values():
            quieted.enter_context(quiet(model))
        for batch, length in shapes:
            clocks = {name: _clock(model, batch, length, new_tokens, compiled) for name, model in opened.items()}
            times = interleaved(clocks, runs, warmup, f"latency, {batch} x {length}")
            for name, found in times.items():
                first = next(iter(times.values()))
                rows[name]["latency"] += [
                    entry(what, seconds, batch, length, first[what]) for what, seconds in found.items()
                ]
    for name, row in rows.items():
        row["notes"] = _notes(row["latency"], describe(opened[name]), device_of(opened[name]).type)
    return rows


# --- sizes -----------------------------------------------------------------------------------------------------------


def _open(model: Measurable) -> PreTrainedModel:
    if not isinstance(model, str | os.PathLike):
        return model
    from ..data.opening import load_model

    loaded: Any = load_model(os.fspath(model))
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu")


def _size(model: PreTrainedModel, given: Measurable, sequence_length: int) -> dict[str, Any]:
    import transformers

    anatomy = describe(model)
    cost = cost_report(anatomy, anatomy.sizes, sequence_length)
    on_disk: dict[str, Any] = {"weights": "", "bytes": None, "load_seconds": None, "resident_bytes": None}
    if isinstance(given, str | os.PathLike):
        home = given if Path(given).is_dir() else snapshot_download(os.fspath(given), local_files_only=True)
        on_disk = {"weights": weights_id(home), "bytes": directory_bytes(home), **footprint(given)}
    return {
        "parameters": int(cost["params_model"]),
        "block_parameters": int(cost["params_blocks"]),
        "macs": int(cost["macs_model"]),
        "block_macs": int(cost["macs_blocks"]),
        "sequence_length": anatomy.tokens(sequence_length),
        "kv_cache_bytes": _cache_bytes(model, anatomy),
        **on_disk,
        "latency": [],
        "settings": {
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(device_of(model)),
            "device_name": device_name(device_of(model)),
            "threads": torch.get_num_threads(),
            "attention": model.config._attn_implementation,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _cache_bytes(model: PreTrainedModel, anatomy: Anatomy) -> int | None:
    """Bytes that a token takes in the cache, over all layers; None where nothing is generated or heads are no units."""
    sites = [site for site in anatomy.sites if site.stack in ("decoder", "text") and site.kind == "attention"]
    if not (model.can_generate() and sites):
        return None
    return sum(2 * site.sizes[site.outer.name] * site.widths[site.outer.name] for site in sites) * model.dtype.itemsize


def directory_bytes(directory: str | os.PathLike[str]) -> int:
    """Bytes of a model's files, without what a Trainer or a card put beside them."""
    home = Path(directory)
    files = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    return sum((home / path).stat().st_size for path in files if not path.parts[0].startswith(NOT_MODEL))


# --- timing ----------------------------------------------------------------------------------------------------------


def _generates(model: PreTrainedModel) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


def _check_length(name: str, model: PreTrainedModel, lengths: Sequence[int]) -> None:
    limit = None if model.main_input_name == "pixel_values" else positions(model)
    if limit is not None and max(lengths, default=0) > limit:
        raise ValueError(f"{name}: {max(lengths)} tokens, new ones included, are more than its {limit} positions.")


def _clock(model: PreTrainedModel, batch: int, length: int, new_tokens: int, compiled: bool) -> Clock:
    inputs = random_inputs(model, batch, length)
    clocks: list[Clock] = [partial(_forward, "forward", model, inputs)]
    if compiled:
        clocks.append(partial(_forward, "compiled forward", torch.compile(model), inputs))
    if new_tokens:
        clocks.append(partial(_generate, model, inputs, new_tokens))
    return lambda: {what: seconds for clock in clocks for what, seconds in clock().items()}


def _forward(what: str, model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {what: timed(model, **inputs)}


def _generate(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> dict[str, float]:
    """The prompt, then one token after another with the cache; which tokens they are does not matter."""
    from transformers import DynamicCache

    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    more: dict[str, Any] = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True, **last}
    prefill = timed(model, **inputs, **more)
    token = inputs["input_ids"][:, -1:]
    return {"prefill": prefill, "decode": statistics.mean(timed(model, token, **more) for _ in range(new_tokens))}


def interleaved(clocks: Mapping[str, Clock], runs: int, warmup: int, title: str) -> dict[str, dict[str, list[float]]]:
    """Seconds of each run by model and by what was timed. Every round starts with another model."""
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in clocks}
    names = list(clocks)
    for turn in tqdm(range(warmup + runs), desc=title, leave=False):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            for what, taken in clocks[name]().items():
                kept = seconds[name].setdefault(what, [])
                if turn >= warmup:
                    kept.append(taken)
    return seconds


def entry(what: str, seconds: Sequence[float], batch: int, length: int, first: Sequence[float]) -> dict[str, Any]:
    """The figures of one model's runs, in seconds; the speed-up is over the runs of the first model."""
    median = statistics.median(seconds)
    tokens = batch if what == "decode" else batch * length
    return {
        "what": what,
        "batch": batch,
        "length": length,
        "median_ms": 1000 * median,
        "p90_ms": 1000 * _quantile(seconds, 0.9),
        "p99_ms": 1000 * _quantile(seconds, 0.99),
        "runs": len(seconds),
        "tokens_per_second": tokens / median,
        "speedup": statistics.median(first) / median,
    }


def _quantile(seconds: Sequence[float], share: float) -> float:
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def _notes(latency: Sequence[Mapping[str, Any]], anatomy: Anatomy, device: str) -> list[str]:
    """Where the model is slower than the first one, and whether its FFN widths suit a device of this kind."""
    slow = [entry for entry in latency if entry["speedup"] < 1]
    if not slow:
        return []
    where = ", ".join(f"{entry['what']} {entry['batch']} x {entry['length']}" for entry in slow)
    align = default_align(anatomy, device)
    odd = sorted({site.columns for site in anatomy.sites if site.inner.aligned and site.columns % align})
    why = (
        f"FFN widths {odd} are not multiples of {align}: prune again with align={align}"
        if odd
        else f"its widths are multiples of {align}; what is left is work that does not shrink with them"
    )
    return [f"slower than the first model at {where}: {why}."]
