"""Inputs for a live model where there are no data, how many tokens it can read, and what it calls its cache.

Shapes: B examples, T tokens.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch import nn

from .maps import image_sides
from .offload import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe_inputs(model: PreTrainedModel, length: int, batch: int = 1) -> dict[str, torch.Tensor]:
    """Dummy inputs of `length` tokens (one image for vision models, see `image_sides`)."""
    config, device = model.config, device_of(model)
    if model.main_input_name == "pixel_values":
        shape = (batch, config.num_channels, *image_sides(config))
        return {"pixel_values": torch.zeros(shape, device=device, dtype=model.dtype)}
    choices = (1,) if "MultipleChoice" in type(model).__name__ else ()
    ids = torch.full((batch, *choices, length), min(5, config.vocab_size - 1), device=device)
    eos = config.eos_token_id
    if isinstance(eos, int) and 0 <= eos < config.vocab_size:
        ids[..., -1] = eos  # BART's classifier reads the hidden state of the last eos
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def random_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Unpadded random tokens [B, T] (of vision models one image an example), the same on every call."""
    generator = torch.Generator().manual_seed(0)
    inputs = probe_inputs(model, length, batch)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = torch.randn(value.shape, generator=generator).to(value)
        elif name.endswith("input_ids"):
            tokens = torch.randint(model.config.vocab_size, value.shape, generator=generator).to(value)
            tokens[..., -1] = value[..., -1]  # BART's classifier needs the end token there
            inputs[name] = tokens
    return inputs


def cache_argument(model: PreTrainedModel) -> str:
    """What a language model calls its cache, in arguments and outputs: `past_key_values` until transformers 5.23."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text model has positions for; None where nothing says."""
    found = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padded = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from behind it
            found.append(module.num_embeddings - padded)
    return min((count for count in found if count), default=None)
