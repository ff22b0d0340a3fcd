"""save_pretrained with proof: written beside the target, reloaded, compared, and only then in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..model.offload import is_offloaded, saveable
from ..model.weights import check_loaded, check_model
from .convert import as_model_type
from .directory import beside, refuse_full
from .history import History, history_of
from .proof import prove
from .remote_code import add_code, coded_class

SHARD = "5GB"  # of offloaded weights that are in memory at once, unless another max_shard_size is asked for
KWARGS = ("max_shard_size", "save_original_format", "state_dict")


def save_pretrained(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    batches: Sequence[Mapping[str, torch.Tensor]] | None = None,
    *,
    processing_class: Any = None,
    overwrite: bool = False,
    remote_code: bool = False,
    model_type: str | None = None,
    **kwargs: Any,
) -> float:
    """`model.save_pretrained` with proof: written beside the target, reloaded, compared, and only then renamed.

    Args:
        batches: inputs to compare the reloaded model on; default: rows kept by prune(), else random tokens.
        processing_class: tokenizer or processor, saved alongside; default: the tokenizer that prune() shortened.
        overwrite: replace a directory that is not empty.
        remote_code: add one generated file, so that the checkpoint opens with trust_remote_code without hf_prune.
        model_type: save the same weights as this stock family ("mistral" for a Llama with any head count).
        kwargs: for `model.save_pretrained`: max_shard_size, state_dict, save_original_format.

    Returns:
        The largest difference between the outputs of the reloaded model and of the one in memory, relative to the
        largest output.

    Raises:
        FileExistsError: the directory is not empty, or a file. ValueError: the model cannot be saved so, does not run
            on the batches, or the directory cannot be replaced as a whole (the current one, a mount point).
        TypeError: a wrapper around a model, or another object than asked for.
        RuntimeError: the reloaded model gives other outputs; nothing is left under the final name.
    """
    check_model(model)
    _check_arguments(model, processing_class, kwargs)
    target = refuse_full(directory, overwrite)
    saved = model if model_type is None else as_model_type(model, model_type)
    cls = coded_class(type(saved)) if remote_code else type(saved)
    history = history_of(model)
    tokenizer = _tokenizer(model, processing_class, history)
    with beside(target) as temporary:
        _write(saved, temporary, kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if history is not None:
            history.save(temporary)
        if remote_code:
            add_code(cls, temporary)
        difference = prove(model, temporary, cls, batches, remote_code)
    return difference


def _write(model: PreTrainedModel, directory: Path, kwargs: Mapping[str, Any]) -> None:
    if not is_offloaded(model):
        model.save_pretrained(directory, **kwargs)
        return
    check_loaded(model)
    with saveable(model):
        model.save_pretrained(directory, **{"max_shard_size": SHARD, **kwargs})


def _tokenizer(model: PreTrainedModel, given: Any, history: History | None) -> Any:
    """What is saved beside the weights.

    Raises:
        ValueError: the tokenizer of the vocabulary as it was before prune() shortened it.
    """
    own = None if history is None else history.processing_class
    if own is None or given is None or not hasattr(given, "get_vocab") or given.get_vocab() == own.get_vocab():
        return own if given is None else given
    raise ValueError(
        f"processing_class has {len(given)} tokens, and the vocabulary of this {type(model).__name__} was shortened to "
        f"{len(own)}. Leave it out: the tokenizer that fits is saved, prune() gave it as result.processing_class."
    )


def _check_arguments(model: PreTrainedModel, processing_class: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for what would be saved otherwise than it is proven."""
    others = sorted({*kwargs} - {*KWARGS})
    if others:
        raise ValueError(
            f"save_pretrained does not take {', '.join(others)}; of model.save_pretrained's: {', '.join(KWARGS)}. The "
            "weights are safetensors of the whole model; to upload them, use `hf-prune push` on what was saved."
        )
    if not isinstance(kwargs.get("state_dict", {}), Mapping):
        raise TypeError(f"state_dict is a mapping of tensors, got {type(kwargs['state_dict']).__name__}.")
    if processing_class is not None and not callable(getattr(processing_class, "save_pretrained", None)):
        raise TypeError(
            f"processing_class is a tokenizer or a processor, got {type(processing_class).__name__}, which has no "
            "save_pretrained."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"This {type(model).__name__} has adapters, and transformers would save those alone. Merge them into the "
            "weights, or take them away (model.delete_adapter)."
        )
