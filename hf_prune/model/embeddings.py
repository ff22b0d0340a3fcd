"""Tokens as units: a smaller vocabulary in a live model.

Shapes: V tokens, S kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cut import slice_
from .sites import Extent, module_of, tensor_of


def cut_tokens_(model: Any, extent: Extent, kept: Sequence[int]) -> None:
    """Keep these rows [S] of the embeddings, of the head and of its bias, in place; tied tensors stay tied."""
    index, ids = torch.tensor(list(kept)), {old: new for new, old in enumerate(kept)}
    new: dict[int, torch.Tensor] = {}
    for part in extent.parts:
        old, module = tensor_of(model, part.tensor), model.get_submodule(module_of(part.tensor))
        if id(old) in new:
            setattr(module, part.tensor.rpartition(".")[2], new[id(old)])
        else:
            slice_(model, part.tensor, index, part.dim)
            new[id(old)] = tensor_of(model, part.tensor)
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(kept)
            module.padding_idx = None if module.padding_idx is None else ids.get(module.padding_idx)
        elif isinstance(module, nn.Linear):
            module.out_features = len(kept)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == extent.of:
            module.vocab_size = len(kept)


def counted_from(model: Any, extent: Extent) -> range:
    """The tokens whose ids must stay as they are: where positions are counted from the id of the padding token."""
    vocabulary = {module_of(part.tensor) for part in extent.parts}
    found = [
        module.padding_idx
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name not in vocabulary and module.padding_idx is not None
    ]
    return range(max(found, default=-1) + 1)
