"""Random inputs for whatever a model can do, found by the names of its arguments, and all that it answers.

Shapes: B examples, T tokens, S positions of a decoder, D their width, E that of an encoder; C channels, H and W of an
image, F frames, P patches with sides of p and V values each (Q with their places); L steps of sound, N or K columns of
a spectrogram of M or R bins; X steps and I channels of a time series.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FIRST_ID = 24  # special tokens lie below
MOST_TRIES = 60  # of each method

LETTERS: dict[str, tuple[tuple[str, ...], int]] = {  # letter: config keys that say how many, or else this many
    "C": (("num_channels", "in_channels", "in_chans", "n_channels"), 3),
    "F": (("num_frames", "frames_per_clip", "temporal_patch_size"), 4),
    "M": (("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "feature_size"), 80),
    "X": (("context_length",), 64),
    "I": (("num_input_channels",), 1),
    "R": (("input_dim", "input_size"), 160),
    "E": (("encoder_hidden_size", "hidden_size", "d_model"), 96),
    "D": (("hidden_size", "d_model", "embed_dim", "dim"), 96),
}
SHAPES: dict[str, tuple[tuple[str | int, ...], ...]] = {  # of floating-point arguments, most likely first
    "pixel_values": (
        ("B", "C", "H", "W"), ("B", 1, "C", "H", "W"), ("B", 2, "C", "H", "W"), ("B", "F", "C", "H", "W"),
        ("P", "V"), ("B", "P", "V"), ("P", "C", "p", "p"),
    ),
    "pixel_values_videos": (("B", "F", "C", "H", "W"), ("P", "V")),
    "pixel_values_images": (("B", "C", "H", "W"),),
    "prompt_pixel_values": (("B", "C", "H", "W"),),
    "prompt_masks": (("B", "C", "H", "W"),),
    "input_values": (("B", "L"), ("B", 1, "L"), ("B", "K", "M")),
    "input_features": (("B", "M", "N"), ("B", "N", "M"), (1, "M", "N"), ("B", "N", 128), ("B", "N", "R")),
    "hidden_states": (("B", "T", "D"), ("P", "V"), ("P", "D")),
    "query_embeds": (("B", "T", "D"),),
    "flattened_patches": (("B", "P", "Q"),),
    "audio_mel": (("B", "K", "M"),),
    "visual_feats": (("B", "T", 2048),),
    "visual_pos": (("B", "T", 4),),
    "past_time_features": (("B", "X", 1),),
    "inputs_embeds": (("B", "T", "D"),),
    "encoder_hidden_states": (("B", "T", "E"),),
    "image_embeds": (("B", "T", "D"),),
    "past_values": (("B", "X", "I"), ("B", "X")),
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
    "merge_sizes": (1,),
    "image_sizes": ("B", 2),
    "spatial_shapes": ("B", 2),
    "pixel_attention_mask": ("B", "P"),
    "input_features_mask": ("B", "N"),
    "feature_attention_mask": ("B", "N"),
    "qformer_input_ids": ("B", "T"),
    "pixel_position_ids": ("B", "P", 2),
    "image_position_ids": ("B", "P", 2),
    "audio_mel_mask": ("B", "K"),
}
FILLS: tuple[tuple[str, Callable[[tuple[int, ...]], torch.Tensor]], ...] = (  # what whole numbers are, by their name
    (r"grid_thw$", lambda size: torch.tensor([[1, 4, 4]])),
    (r"position_ids$", lambda size: torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(size)),
    (r"^image_sizes$", lambda size: torch.full(size, 16)),
    (r"^spatial_shapes$", lambda size: torch.full(size, 4)),
    (r"^bbox$", lambda size: torch.arange(10, 10 + math.prod(size)).reshape(size)),
    (r"mel_mask$", lambda size: torch.zeros(size, dtype=torch.bool)),
    (r"^token_type_ids$", lambda size: torch.zeros(size, dtype=torch.long)),
    (r"", lambda size: torch.ones(size, dtype=torch.long)),
)
WAYS: tuple[tuple[str, ...], ...] = (  # optional arguments to give together, beside those that are required
    ("input_ids", "decoder_input_ids"),
    ("input_ids",),
    ("pixel_values",),
    ("input_ids", "pixel_values"),
    ("pixel_values", "decoder_input_ids"),
    ("input_ids", "bbox"),
    ("input_ids", "bbox", "pixel_values"),
    ("input_ids", "bbox", "decoder_input_ids"),
    ("pixel_values_videos",),
    ("input_features",),
    ("input_values",),
    ("input_features", "decoder_input_ids"),
    ("input_values", "decoder_input_ids"),
    ("input_ids", "input_features"),
    ("input_ids", "input_values"),
    ("pixel_values", "image_grid_thw"),
    ("pixel_values", "grid_thw"),
    ("pixel_values", "spatial_shapes", "pixel_attention_mask"),
    ("pixel_values", "image_position_ids"),
    ("pixel_values", "image_sizes"),
    ("input_features", "input_features_mask"),
    ("input_features", "attention_mask"),
    ("input_features", "feature_attention_mask"),
    ("input_ids", "encoder_hidden_states"),
    ("query_embeds", "encoder_hidden_states"),
    ("flattened_patches", "decoder_input_ids"),
    ("flattened_patches",),
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
    for feed in _tries(model, seed):
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
    if not ends:
        return set()
    slopes = torch.autograd.grad(ends, [*weights.values()], allow_unused=True, retain_graph=True)
    return {name for name, slope in zip(weights, slopes, strict=True) if slope is not None}


# --- guesses ---------------------------------------------------------------------------------------------------------


def _tries(model: PreTrainedModel, seed: int) -> Iterator[Feed]:
    for method in METHODS:
        if hasattr(model, method):
            for inputs in itertools.islice(_arguments(model, method, seed), MOST_TRIES):
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
    letters |= {"B": 2, "T": 9, "S": 7, "L": 3840}
    letters["N"] = 2 * (_count(config, ("max_source_positions",), 32))
    letters["K"] = _count(config, ("max_length", "spec_size"), 256)
    patch, deep = _count(config, ("patch_size",), 0), _count(config, ("temporal_patch_size",), 1)
    own = min(_count(config, ("image_size", "input_size"), 224), 448)
    for side in (own,) if patch else dict.fromkeys((64, own)):  # convolutions read images of any size
        flat = letters["C"] * patch * patch
        yield letters | {"H": side, "W": side, "P": 16, "p": patch, "V": flat * deep, "Q": flat + 2}


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
        return torch.randn(size, generator=generator).to(model.device, model.dtype)
    if name.endswith("input_ids"):
        vocabulary = _count(model.config, ("vocab_size",), 128)
        return torch.randint(FIRST_ID, max(vocabulary, FIRST_ID + 2), size, generator=generator).to(model.device)
    return next(fill(size) for pattern, fill in FILLS if re.search(pattern, name)).to(model.device)
