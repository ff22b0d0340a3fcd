"""A live model and its weights: whether they can be cut, and how they are held still meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate.utils import has_offloaded_params
from torch import nn

from .offload import check_readable, check_writable, let_go

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
    """Raise ValueError for weights that cannot be sliced: with adapters, quantised, or sharded."""
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
        if hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
            raise ValueError(f"{name} is sharded; gather the model (or prune before FSDP/DeepSpeed/TP wraps it).")
        if not parameter.is_floating_point():
            raise ValueError(f"{name} holds {parameter.dtype}; only floating-point weights can be pruned. Dequantise.")


def check_loaded(model: nn.Module) -> None:
    """Raise for weights that are nowhere, neither in memory nor where a hook of accelerate's loads them from.

    Raises:
        ValueError: on the meta device. FileNotFoundError: offloaded to a file that is not there.
    """
    for path, module in model.named_modules():
        name = next((name for name, p in module.named_parameters(path, recurse=False) if p.is_meta), None)
        if name is not None and not has_offloaded_params(module):
            raise ValueError(
                f"{name} is on the meta device: load the weights before pruning. (Offloaded weights may stay where "
                "they are if accelerate's hooks load each module's by itself, as from_pretrained(device_map=...) and "
                "dispatch_model attach them: without preload_module_classes, and no two hooks on one module.)"
            )
    check_readable(model)


def check_cuttable(model: nn.Module, share: float) -> None:
    """Raise for weights that are nowhere, or whose successors cannot be stored.

    Args:
        share: of the weights, how much a cut leaves at most.

    Raises:
        ValueError: on the meta device, or on disk without an offload folder. OSError: the offload folder is of no use.
    """
    check_loaded(model)
    check_writable(model, share)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for the weights; training flags and requires_grad come back, also on error,
    and offloaded weights that a stopped pass has left behind are dropped."""
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
        let_go(model)
        for module, flag in training.items():
            module.training = flag
        for (module, name), needed in requires_grad.items():
            getattr(module, name).requires_grad_(needed)
