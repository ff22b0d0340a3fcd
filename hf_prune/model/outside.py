"""Multiply-adds of what lies outside the sites, from the shapes of the matrices. No forward pass.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def outside_macs(model: Any, layers: list[str], tokens: int | None) -> tuple[float, float]:
    """Multiply-adds outside the blocks: for each token, and for each example."""
    inside = tuple(f"{path}." for path in layers)
    per_token = per_example = 0.0
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            per_example += module.weight.numel() * _positions_of(model, module)
        elif _is_matrix(module) and _sees_tokens(model, name):
            per_token += module.weight.numel()
        elif _is_matrix(module):
            per_example += module.weight.numel()
    return (0.0, per_example + per_token * tokens) if tokens else (per_token, per_example)


def _is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# modules of heads and poolers that see one row an example; `classifier` does where the task is about whole examples
ONE_ROW = (
    "pooler", "classification_head", "pre_classifier", "seq_relationship", "multiple_choice_head", "sequence_summary",
)  # fmt: skip
ONE_ROW_TASKS = ("SequenceClassification", "ImageClassification", "MultipleChoice", "NextSentence")


def _sees_tokens(model: Any, name: str) -> bool:
    """Whether a matrix outside the blocks sees every token, or one row an example."""
    words = name.split(".")
    if any(word in ONE_ROW for word in words):
        return False
    pooled = any(task in type(model).__name__ for task in ONE_ROW_TASKS)
    return not (pooled and any(word.startswith("classifier") for word in words))


def other_elements(model: nn.Module, path: str, but: set[str]) -> int:
    """Elements of the matrices of a layer that belong to none of its sites."""
    return sum(
        module.weight.numel()
        for name, module in model.get_submodule(path).named_modules()
        if _is_matrix(module) and f"{path}.{name}.weight" not in but
    )


def _positions_of(model: Any, convolution: Any) -> int:
    """Of a convolution over pixels, how often its kernel is applied to one image."""
    sides = model.config.image_size
    sides = sides if isinstance(sides, list | tuple) else (sides, sides)
    patch = model.config.patch_size
    steps = (max(stride, patch) for stride in convolution.stride)  # what follows the patches sees one row for each
    return math.prod(side // step for side, step in zip(sides, steps, strict=True))


def image_tokens(model: Any) -> int | None:
    """Tokens of one image: its patches and the special ones before them; None for text."""
    if model.main_input_name != "pixel_values":
        return None
    found = [
        p.shape[1] for name, p in model.named_parameters() if name.endswith("position_embeddings") and p.dim() == 3
    ]
    return found[0]
