"""Multiply-adds of what lies outside the sites, from the shapes of the matrices. No forward pass.

Shapes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn


def outside_macs(model: Any, rows: Mapping[str, tuple[int, int]], but: set[str]) -> tuple[float, float]:
    """Multiply-adds outside the blocks: for each token, and for each example.

    Args:
        rows: see `rows_outside`.
        but: tensors that belong to sites all the same: of a stem.
    """
    elements = {name: model.get_submodule(name).weight.numel() * (f"{name}.weight" not in but) for name in rows}
    per_token, per_example = (float(sum(elements[name] * row[i] for name, row in rows.items())) for i in (0, 1))
    return per_token, per_example


def rows_outside(model: Any, layers: list[str], tokens: int | None) -> dict[str, tuple[int, int]]:
    """How often each matrix outside the layers is applied, by its module: for each token, and for each example."""
    inside = tuple(f"{path}." for path in layers)
    outside = {name: module for name, module in model.named_modules() if not name.startswith(inside)}
    steps = {name: module.stride[0] for name, module in outside.items() if isinstance(module, nn.Conv1d)}
    found = {name: (math.prod([*steps.values()][i + 1 :]), 0) for i, name in enumerate(steps)}  # each shortens sound
    for name, module in outside.items():
        if isinstance(module, nn.Conv2d):
            found[name] = (0, _positions_of(model, module))
        elif is_matrix(module):
            found[name] = (1, 0) if _sees_tokens(model, name) else (0, 1)
    return {name: (0, a + b * tokens) if tokens else (b, a) for name, (b, a) in found.items()}


def is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


# modules of heads and poolers that see one row an example; `classifier` and `head` do where the task is about whole
# examples
ONE_ROW = (
    "pooler", "classification_head", "pre_classifier", "seq_relationship", "multiple_choice_head", "sequence_summary",
    "text_projection", "visual_projection",
)  # fmt: skip
ONE_ROW_TASKS = ("SequenceClassification", "ImageClassification", "MultipleChoice", "NextSentence")


def _sees_tokens(model: Any, name: str) -> bool:
    """Whether a matrix outside the blocks sees every token, or one row an example."""
    words = name.split(".")
    if any(word in ONE_ROW for word in words):
        return False
    pooled = any(task in type(model).__name__ for task in ONE_ROW_TASKS)
    return not (pooled and any(word.startswith("classifier") or word == "head" for word in words))


def other_elements(model: nn.Module, path: str, but: set[str]) -> int:
    """Elements of the matrices of a layer that belong to none of its sites."""
    return sum(model.get_submodule(name).weight.numel() for name in other_matrices(model, path, but))  # type: ignore[operator, misc]


def other_matrices(model: nn.Module, path: str, but: set[str]) -> list[str]:
    """The modules of a layer with a matrix that belongs to none of its sites."""
    inside = model.get_submodule(path).named_modules(prefix=path)
    return [name for name, module in inside if is_matrix(module) and f"{name}.weight" not in but]


def _positions_of(model: Any, convolution: Any) -> int:
    """Of a convolution over pixels, how often its kernel is applied to one image; 0 where the config does not say how
    large images are (sound has no set length)."""
    config = vision_config(model.config)
    if not _has_images(config) or not isinstance(convolution, nn.Conv2d):
        return max((image_tokens(model) or 0) - _special(model), 0)  # a picture of sound
    sides, patch = _both(config.image_size), _both(config.patch_size)
    steps = (max(stride, size) for stride, size in zip(convolution.stride, patch, strict=True))
    return math.prod(side // step for side, step in zip(sides, steps, strict=True))  # behind the patches: one row each


def vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", config)


def _has_images(config: Any) -> bool:
    return all(isinstance(getattr(config, key, None), int | list | tuple) for key in ("image_size", "patch_size"))


def _both(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


PICTURES = ("pixel_values", "input_values")  # of sound there are pictures, too
SPECIAL = ("cls_token", "register_tokens", "distillation_token", "class_embedding")


def image_tokens(model: Any) -> int | None:
    """Tokens of one image: its patches and the special ones before them; None for text, and for sound of any length."""
    if model.main_input_name not in PICTURES:
        return None
    named = [(name, p) for name, p in model.named_parameters() if name.rpartition(".")[0].endswith("embeddings")]
    tables = [p.shape[1] for name, p in named if name.endswith("position_embeddings") and p.dim() == 3]
    if tables or model.main_input_name != "pixel_values":
        return tables[0] if tables else None
    config = vision_config(model.config)
    if not _has_images(config):
        return None
    sides, patch = _both(config.image_size), _both(config.patch_size)
    return math.prod(side // size for side, size in zip(sides, patch, strict=True)) + _special(model)


def tower_tokens(model: Any, stacks: list[str]) -> dict[str, int]:
    """Tokens of one image in the vision tower of a model that reads text too, where its config says how large it is."""
    config = vision_config(model.config)
    if "vision" not in stacks or not _has_images(config):
        return {}
    sides, patch = _both(config.image_size), _both(config.patch_size)
    return {"vision": math.prod(side // size for side, size in zip(sides, patch, strict=True)) + _special(model)}


def _special(model: Any) -> int:
    """Tokens before the patches."""
    found = [p for name, p in model.named_parameters() if name.endswith(SPECIAL)]
    return sum(p.shape[1] if p.dim() == 3 else 1 for p in found)
