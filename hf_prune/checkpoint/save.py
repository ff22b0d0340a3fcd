"""save_pretrained with proof: written beside the target, reloaded, compared, and only then in its place."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .convert import as_model_type
from .directory import beside, refuse_full
from .history import record_of
from .proof import prove
from .remote_code import add_code


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
        processing_class: tokenizer or processor, saved alongside.
        overwrite: replace a directory that is not empty.
        remote_code: add one generated file, so that the checkpoint opens with trust_remote_code without hf_prune.
        model_type: save the same weights as this stock family ("mistral" for a Llama with any head count).
        kwargs: for `model.save_pretrained`.

    Returns:
        The largest difference between the outputs of the reloaded model and of the one in memory, relative to the
        largest output.

    Raises:
        FileExistsError: the directory is not empty, or a file. ValueError: the model cannot be saved so, or the
            directory cannot be replaced as a whole (the current one, a mount point).
        RuntimeError: the reloaded model gives other outputs; nothing is left under the final name.
    """
    target = refuse_full(directory, overwrite)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"save_pretrained takes a transformers PreTrainedModel, got {type(model).__name__}.")
    saved = model if model_type is None else as_model_type(model, model_type)
    with beside(target) as temporary:
        saved.save_pretrained(temporary, **kwargs)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
        record = record_of(model)
        if record is not None:
            record.save(temporary)
        if remote_code:
            add_code(saved, temporary)
        difference = prove(model, temporary, type(saved), batches, remote_code)
    return difference
