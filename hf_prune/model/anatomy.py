"""A family row resolved on a live model: its sites and sizes, read off the weights.

Shapes: N query heads, G KV heads, H head dim, F FFN width, D hidden width, T tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .families import Attention, Family, family_for
from ..plan import SiteKey
from .sites import Site, consumer, find_sites, output_axis, ups

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """The sites of a model and what lies outside them, as plain data."""

    model_type: str
    family: Family
    sites: tuple[Site, ...]
    hidden_size: int
    total_params: int
    block_params: int
    outside_macs_token: float  # multiply-adds outside the blocks, per token
    outside_macs_example: float  # and per example
    other_macs_token: float  # inside the blocks, outside the sites
    image_tokens: int | None  # tokens of one image, None for text

    @property
    def sizes(self) -> dict[SiteKey, dict[str, int]]:
        return {site.key: site.sizes for site in self.sites}

    def tokens(self, sequence_length: int) -> int:
        return self.image_tokens or sequence_length


def describe(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a live model. Runs it twice on a few dummy tokens to see which layers outside the blocks see them.

    Raises:
        TypeError: no transformers model, or a wrapper of one.
        ValueError: unknown family; adapters; quantised, meta or sharded weights; a path of the row that does not
            resolve.
    """
    check_model(model)
    family = family_for(model.config.model_type)
    check_weights(model)
    sites = find_sites(model, family)
    layers = {site.path for site in sites}
    probe = _probe(model, sites)
    block_params = sum(p.numel() for path in layers for p in model.get_submodule(path).parameters())
    return Anatomy(
        model_type=family.model_type,
        family=family,
        sites=tuple(replace(site, active=probe["active"][site.key]) for site in sites),
        hidden_size=consumer(model, sites[0]).weight.shape[output_axis(consumer(model, sites[0]))],
        total_params=sum(p.numel() for p in model.parameters()),
        block_params=block_params,
        outside_macs_token=probe["outside"][0],
        outside_macs_example=probe["outside"][1],
        other_macs_token=probe["other"],
        image_tokens=probe["image_tokens"],
    )


WRAPPERS = {"_orig_mod": "torch.compile", "merge_and_unload": "peft", "module": "data parallelism"}


def check_model(model: Any) -> None:
    """Raise TypeError for all that is no transformers model; of a wrapper it says how to get at what it holds."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return
    name = f"{type(model).__module__}.{type(model).__name__}"
    door = next((door for door in WRAPPERS if isinstance(model, nn.Module) and hasattr(model, door)), None)
    if door is None:
        raise TypeError(f"hf_prune takes a transformers PreTrainedModel, got {name}. Open one with from_pretrained.")
    inner = f"model.{door}{'()' if door == 'merge_and_unload' else ''}"
    raise TypeError(f"{name} is a wrapper ({WRAPPERS[door]}) around a transformers model: hand over {inner}.")


def check_weights(model: nn.Module) -> None:
    """Raise ValueError for weights that cannot be sliced: with adapters, quantised, on the meta device, or sharded."""
    adapted = next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"{adapted} has an adapter, which a cut would not fit any more. Merge it into the weights first (peft: "
            "model.merge_and_unload()), or take it away (model.delete_adapter)."
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise ValueError(
            "The model is quantised; packed weights cannot be pruned. Load it without quantization_config, call "
            "model.dequantize(), or, for GGUF, load with GgufConfig(dequantize=True), then prune and quantise again."
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: load the weights (no offload to disk) before pruning.")
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
            raise ValueError(f"{name} is sharded; gather the model (or prune before FSDP/DeepSpeed/TP wraps it).")
        if not parameter.is_floating_point():
            raise ValueError(f"{name} holds {parameter.dtype}; only floating-point weights can be pruned. Dequantise.")


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the weights; training flags and requires_grad come back, also on error."""
    training = {module: module.training for module in model.modules()}
    requires_grad = {  # by place: a cut puts new parameters there
        (module, name): p.requires_grad
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
    }
    try:
        model.eval()
        for p in model.parameters():
            p.requires_grad_(False)
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for (module, name), needed in requires_grad.items():
            getattr(module, name).requires_grad_(needed)


def _probe(model: PreTrainedModel, sites: list[Site]) -> dict[str, Any]:
    """Count the rows that every matrix sees at two lengths: MACs outside the sites, and which sites run at all."""
    paths = tuple(f"{path}." for path in sorted({site.path for site in sites}))
    in_site = {f"{s.path}.{p}" for s in sites for p in _matrices(model, s)}
    runs = []
    for length in (8, 16):
        counted = _count_rows(model, probe_inputs(model, length))
        macs = {"outside": 0, "other": 0}
        for name, (_, count) in counted.items():
            if name not in in_site:
                macs["other" if name.startswith(paths) else "outside"] += count
        runs.append((macs, counted))
    (small, _), (large, counted) = runs
    per_token = (large["outside"] - small["outside"]) / 8
    is_image = model.main_input_name == "pixel_values"
    rows = {site.key: counted.get(f"{site.path}.{site.row.consumer}", (0, 0))[0] for site in sites}
    tokens = max(rows.values()) if is_image else 16
    return {
        "outside": (per_token, large["outside"] - 16 * per_token),
        "other": large["other"] / tokens,
        "active": {key: count > 0 for key, count in rows.items()},
        "image_tokens": tokens if is_image else None,
    }


def _matrices(model: nn.Module, site: Site) -> tuple[str, ...]:
    layer = model.get_submodule(site.path)
    producers = site.row.producers if isinstance(site.row, Attention) else ups(layer, site.row)
    return (*producers, site.row.consumer)


@torch.no_grad()
def _count_rows(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Rows seen by, and multiply-adds of, every Linear, Conv1D and convolution in one forward pass."""
    counted: dict[str, tuple[int, int]] = {}

    def hook(name: str, axis: int) -> Any:
        def count(module: Any, args: Any, output: torch.Tensor) -> None:
            rows = output.numel() // module.weight.shape[axis]
            before = counted.get(name, (0, 0))
            counted[name] = (before[0] + rows, before[1] + rows * module.weight.numel())

        return count

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d) or type(module).__name__ == "Conv1D":
            axis = output_axis(module) if not isinstance(module, nn.Conv2d | nn.Conv1d) else 0
            handles.append(module.register_forward_hook(hook(name, axis)))
    try:
        with quiet(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def probe_inputs(model: PreTrainedModel, length: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Dummy inputs of `length` tokens (one image for vision models)."""
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {
            "pixel_values": torch.zeros(batch, config.num_channels, height, width, device=device, dtype=model.dtype)
        }
    choices = (1,) if "MultipleChoice" in type(model).__name__ else ()
    ids = torch.full((batch, *choices, length), min(5, config.vocab_size - 1), device=device)
    eos = config.eos_token_id
    if isinstance(eos, int) and 0 <= eos < config.vocab_size:
        ids[..., -1] = eos  # BART's classifier reads the hidden state of the last eos
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text model has positions for; None where nothing says."""
    found = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padded = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind it
            found.append(module.num_embeddings - padded)
    return min((count for count in found if count), default=None)
