"""Random inputs for whatever a model can do, found by the names of its arguments, and all that it answers.

Shapes: B examples, T tokens, S positions of a decoder, C channels, H and W of an image, F frames, M bins of a
spectrogram, L steps of sound, D hidden width, P patches of V values each.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FIRST_ID = 24  # special tokens lie below
MOST_TRIES = 60

LETTERS: dict[str, tuple[tuple[str, ...], int]] = {  # letter: config keys that say how many, or else this many
    "C": (("num_channels", "in_channels", "in_chans", "n_channels"), 3),
    "F": (("num_frames", "frames_per_clip", "temporal_patch_size"), 4),
    "M": (("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size"), 80),
    "D": (("hidden_size", "d_model", "embed_dim", "dim"), 96),
}
SHAPES: dict[str, tuple[tuple[str | int, ...], ...]] = {  # of floating-point arguments, most likely first
    "pixel_values": (
        ("B", "C", "H", "W"), ("B", 1, "C", "H", "W"), ("B", "F", "C", "H", "W"), ("P", "V"), ("B", "P", "V"),
    ),
    "pixel_values_videos": (("B", "F", "C", "H", "W"), ("P", "V")),
    "pixel_values_images": (("B", "C", "H", "W"),),
    "input_values": (("B", "L"), ("B", 1, "L"), ("B", "K", "M")),
    "input_features": (("B", "M", "N"), ("B", "N", "M"), (1, "M", "N")),
    "hidden_states": (("B", "T", "D"),),
    "inputs_embeds": (("B", "T", "D"),),
    "encoder_hidden_states": (("B", "T", "D"),),
    "image_embeds": (("B", "T", "D"),),
    "past_values": (("B", 64, 1), ("B", 64, 7)),
}  # fmt: skip
WHOLE: dict[str, tuple[str | int, ...]] = {  # of arguments of whole numbers
    "input_ids": ("B", "T"),
    "decoder_input_ids": ("B", "S"),
    "attention_mask": ("B", "T"),
    "token_type_ids": ("B", "T"),
    "bbox": ("B", "T", 4),
    "image_grid_thw": (1, 3),
    "video_grid_thw": (1, 3),
    "grid_thw": (1, 3),
    "spatial_shapes": ("B", 2),
    "pixel_attention_mask": ("B", "P"),
    "input_features_mask": ("B", "N"),
    "feature_attention_mask": ("B", "N"),
}
WAYS: tuple[tuple[str, ...], ...] = (  # optional arguments to give together, beside those that are required
    ("input_ids", "decoder_input_ids"),
    ("input_ids",),
    ("pixel_values",),
    ("input_ids", "pixel_values"),
    ("pixel_values", "decoder_input_ids"),
    ("input_ids", "bbox"),
    ("input_ids", "bbox", "pixel_values"),
    ("pixel_values_videos",),
    ("input_features",),
    ("input_values",),
    ("input_features", "decoder_input_ids"),
    ("input_values", "decoder_input_ids"),
    ("input_ids", "input_features"),
    ("input_ids", "input_values"),
    ("pixel_values", "image_grid_thw"),
    ("input_features", "input_features_mask"),
    ("input_features", "attention_mask"),
    ("hidden_states",),
    ("inputs_embeds",),
    (),
)
METHODS = (
    "forward", "get_image_features", "get_video_features", "get_audio_features", "get_text_features",
    "get_speech_features",
)  # fmt: skip


@dataclass(frozen=True)
class Feed:
    """What to call on a model, and with which tensors."""

    method: str
    inputs: dict[str, torch.Tensor]


def feeds(model: PreTrainedModel, seed: int = 0) -> list[Feed]:
    """Inputs that run and give finite numbers: as many calls as it takes to reach every weight that any does.

    Raises:
        ValueError: nothing runs; the message says what each try met.
    """
    missing = {name for name, weight in model.named_parameters() if weight.requires_grad}
    found: list[Feed] = []
    reasons: list[str] = []
    for feed in itertools.islice(_tries(model, seed), MOST_TRIES):
        try:
            reached = _reached(model, feed)
        except Exception as error:  # a wrong guess may fail in any way
            reasons.append(f"{feed.method}({', '.join(feed.inputs)}): {type(error).__name__}: {error}"[:160])
            continue
        if missing & reached or not found:
            found.append(feed)
            missing -= reached
        if not missing:
            break
    if not found:
        raise ValueError("; ".join(dict.fromkeys(reasons)) or "no argument is known")
    return found


def observed(model: PreTrainedModel, feeds: list[Feed]) -> list[torch.Tensor]:
    """All floating-point tensors that the model answers, in order; models that draw noise draw the same every time."""
    with torch.no_grad():
        return [answer for feed in feeds for answer in _answers(model, feed)]


def _answers(model: PreTrainedModel, feed: Feed) -> list[torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return list(tensors(getattr(model, feed.method)(**feed.inputs)))


def tensors(answer: Any) -> Iterator[torch.Tensor]:
    if isinstance(answer, torch.Tensor):
        if answer.is_floating_point():
            yield answer
    elif isinstance(answer, dict | list | tuple):
        for part in answer.values() if isinstance(answer, dict) else answer:
            yield from tensors(part)


def _reached(model: PreTrainedModel, feed: Feed) -> set[str]:
    """The weights that the answers depend on."""
    answers = _answers(model, feed)
    if not answers or not all(answer.isfinite().all() for answer in answers):
        raise ValueError("the answer is not finite" if answers else "no answer")
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    ends = [answer.sum() for answer in answers if answer.requires_grad]
    slopes = torch.autograd.grad(ends, [*weights.values()], allow_unused=True) if ends else [None] * len(weights)
    return {name for name, slope in zip(weights, slopes, strict=True) if slope is not None}


# --- guesses ---------------------------------------------------------------------------------------------------------


def _tries(model: PreTrainedModel, seed: int) -> Iterator[Feed]:
    for method in METHODS:
        if hasattr(model, method):
            for inputs in _arguments(model, method, seed):
                yield Feed(method, inputs)


def _arguments(model: PreTrainedModel, method: str, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sets of arguments of one method: each way that it knows, in each shape that its arguments may have."""
    parameters = inspect.signature(getattr(model, method)).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    required = [name for name in required if name in SHAPES or name in WHOLE]
    seen = set()
    for way in WAYS:
        names = tuple(dict.fromkeys((*required, *way)))
        if not names or names in seen or not {*names} <= {*parameters}:
            continue
        seen.add(names)
        for letters in _letters(model.config):
            for shapes in itertools.product(*(SHAPES.get(name) or (WHOLE[name],) for name in names)):
                generator = torch.Generator().manual_seed(seed)
                sizes = [tuple(letters[step] if isinstance(step, str) else step for step in shape) for shape in shapes]
                yield {n: _values(model, n, size, generator) for n, size in zip(names, sizes, strict=True)}


def _letters(config: PreTrainedConfig) -> Iterator[dict[str, int]]:
    """What the letters of shapes stand for, once for each size that images may have."""
    letters = {letter: _count(config, keys, default) for letter, (keys, default) in LETTERS.items()}
    letters |= {"B": 2, "T": 9, "S": 7, "L": 3200}
    letters["N"] = 2 * (_count(config, ("max_source_positions",), 32))
    letters["K"] = _count(config, ("max_length", "spec_size"), 256)
    patch, deep = _count(config, ("patch_size",), 0), _count(config, ("temporal_patch_size",), 1)
    own = _count(config, ("image_size", "input_size"), 224)
    for side in (own,) if patch else dict.fromkeys((64, own)):  # convolutions read images of any size
        yield letters | {"H": side, "W": side, "P": 16, "V": letters["C"] * deep * patch * patch}


def _count(config: PreTrainedConfig, keys: tuple[str, ...], default: int) -> int:
    """The first of some keys that a config or a sub-config has a number for."""
    for key in keys:
        value = vars(config).get(key)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if type(value) is int:
            return value
    parts = (part for part in vars(config).values() if hasattr(part, "sub_configs"))
    return next((found for part in parts if (found := _count(part, keys, 0))), default)


def _values(model: PreTrainedModel, name: str, size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if name in SHAPES:
        return torch.randn(size, generator=generator).to(model.dtype)
    if name.endswith("input_ids"):
        text = model.config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None) or _count(model.config, ("vocab_size",), 128)
        return torch.randint(FIRST_ID, max(vocabulary, FIRST_ID + 2), size, generator=generator)
    if name == "bbox":
        return torch.randint(0, 50, size, generator=generator).sort(-1).values
    if name.endswith("grid_thw"):
        return torch.tensor([[1, 4, 4]])
    if name == "spatial_shapes":
        return torch.full(size, 4)
    return torch.zeros(size, dtype=torch.long) if name == "token_type_ids" else torch.ones(size, dtype=torch.long)
