"""Tokens as units: a smaller vocabulary in a live model.

Shapes: V tokens, S kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .along import cut_along_
from .sites import Extent, module_of


def cut_tokens_(model: Any, extent: Extent, kept: Sequence[int]) -> None:
    """Keep these rows [S] of the embeddings, of the head and of its bias, in place; tied tensors stay tied."""
    ids = {old: new for new, old in enumerate(kept)}
    cut_along_(model, extent, kept)
    for part in extent.parts:
        module = model.get_submodule(module_of(part.tensor))
        if isinstance(module, nn.Embedding):
            module.padding_idx = None if module.padding_idx is None else ids.get(module.padding_idx)
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
