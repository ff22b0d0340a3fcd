"""Multiply-adds of what lies outside the sites, from the shapes of the matrices. No forward pass.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from .configs import nested


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
    """Of a convolution over pixels, how often its kernel is applied to one image; 0 where the config does not say how
    large images are (sound has no set length)."""
    config = _image_config(model)
    if config is None or not isinstance(convolution, nn.Conv2d):
        return 0
    patch = config.patch_size
    patches = patch if isinstance(patch, list | tuple) else (patch, patch)
    steps = (
        max(stride, p) for stride, p in zip(convolution.stride, patches, strict=False)
    )  # then a row for each patch
    return math.prod(side // step for side, step in zip(_sides(config), steps, strict=False))


def _image_config(model: Any) -> Any:
    """The config that says how large images and patches are; None where none does."""
    return next((c for c in nested(model.config) if _is_size(c, "image_size") and _is_size(c, "patch_size")), None)


def _is_size(config: Any, key: str) -> bool:
    return isinstance(vars(config).get(key), int | list | tuple)


def _sides(config: Any) -> Sequence[int]:
    size = config.image_size
    return size if isinstance(size, list | tuple) else (size, size)


def image_tokens(model: Any) -> int | None:
    """Tokens of one image: its patches and the special ones before them; None for text."""
    if model.main_input_name != "pixel_values":
        return None
    found = [
        p.shape[1] for name, p in model.named_parameters() if name.endswith("position_embeddings") and p.dim() == 3
    ]
    config = _image_config(model)
    if found or config is None:
        return found[0] if found else None
    patch = config.patch_size
    patches = patch if isinstance(patch, list | tuple) else (patch, patch)
    return 1 + math.prod(side // p for side, p in zip(_sides(config), patches, strict=False))
