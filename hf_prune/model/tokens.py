"""Where the vocabulary lies in a live model.

Shapes: V tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from .axes import Part
from .sites import find_tensor


def token_parts(model: Any, layers: list[str]) -> tuple[Part, ...]:
    """Where the vocabulary lies: input embeddings, the head over tokens, and biases as long; () for a model without.

    Tensors that are tied come once for each of their names.
    """
    embeddings = list(input_embeddings(model))
    if not embeddings:
        return ()
    rows, inside = embeddings[0].num_embeddings, tuple(f"{path}." for path in layers)
    head = model.get_output_embeddings()
    tables = {id(module.weight) for module in embeddings if module.num_embeddings == rows}
    tied = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m.weight) in tables]  # Marian has a third
    along = {id(module): (0, "carries") for module in tied}
    if head is not None and head.weight.shape[0] == rows:
        along[id(head)] = (0, "makes")
    parts = [
        Part(f"{name}.weight", along[id(module)][0], ("tokens",), along[id(module)][1])  # type: ignore[arg-type]
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) in along
    ]
    biases = [
        Part(name, tensor.dim() - 1, ("tokens",), "carries")
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        if name.endswith("bias") and tensor.dim() and tensor.shape[-1] == rows and not name.startswith(inside)
    ]
    return (*parts, *biases)


def input_embeddings(model: Any) -> Iterator[nn.Embedding]:
    """The input embeddings of a model, and of the models inside it."""
    from transformers import PreTrainedModel

    for each in model.modules():
        with contextlib.suppress(NotImplementedError):  # a wrapper that has none of its own
            found = each.get_input_embeddings() if isinstance(each, PreTrainedModel) else None
            if isinstance(found, nn.Embedding):
                yield found


def params_a_token(model: Any, parts: tuple[Part, ...]) -> float:
    """Parameters of one token; tied tensors count once."""
    found = {id(find_tensor(model, part.tensor)): find_tensor(model, part.tensor) for part in parts}
    return sum(t.numel() / t.shape[0 if t.dim() > 1 else -1] for t in found.values() if isinstance(t, nn.Parameter))
