"""A small random instance of any model type: its config, class and weights (inputs come from `feed`)."""

from __future__ import annotations

import copy
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from .feed import Feed, feeds, observed
from .smaller import candidates, reason_of, small_configs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["build", "classes_of", "instance", "quiet", "randomize_", "small_configs"]

MOST_PARAMETERS = 45_000_000
SECONDS = 20.0
SETTLED = 0.9  # how much of a running statistic is what the norm reads; the rest is its own
DTYPES = (torch.float64, torch.float32)

TASKS = (  # heads that read the whole output come first, the bare model where nothing does
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CTC",
    "RNNT", "TDT", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "VIDEO_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "SEQUENCE_CLASSIFICATION", "TEXT_ENCODING", "", "BACKBONE",
    "PRETRAINING",
)  # fmt: skip


def classes_of(model_type: str) -> list[str]:
    """Names of the classes of a model type, the most telling first; those of a part of it come last."""
    from transformers.models.auto import modeling_auto

    tables = {key: table for key, table in vars(modeling_auto).items() if re.fullmatch("MODEL_.*MAPPING_NAMES", key)}
    order = [f"MODEL_FOR_{task}_MAPPING_NAMES" if task else "MODEL_MAPPING_NAMES" for task in TASKS]
    found: list[str] = []
    for key in (*order, *tables):
        names = tables.get(key, {}).get(model_type, ())
        found += [names] if isinstance(names, str) else names
    return sorted(dict.fromkeys(found), key=lambda name: _is_of_a_part(name, model_type))


def _is_of_a_part(name: str, model_type: str) -> bool:
    """Does a class read the config of another type, such as that of the text tower?"""
    import transformers

    try:
        read = getattr(getattr(transformers, name, None), "config_class", None)
    except ImportError:  # of a package that is not installed
        return False
    return getattr(read, "model_type", model_type) != model_type


# --- a small model ---------------------------------------------------------------------------------------------------


def build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A model of a copy of the config, to be evaluated: plain attention and experts, no cache."""
    config = copy.deepcopy(config)
    for part in _parts(config):
        if "use_cache" in vars(part):
            part.use_cache = False
    with torch.device(device):
        return cls._from_config(config, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "sub_configs"):
            yield from _parts(value)


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 0) -> None:
    """Weights so large that every unit matters, and biases, norms and running statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if id(weight) in done or not weight.requires_grad:  # a table of sines is not saved
                continue
            done.add(id(weight))
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            if weight.dim() > 1:
                matrices = weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)  # of experts
                fan = max(weight.shape[1:]) if matrices else weight[0].numel()
                weight.copy_(noise * min(0.5, 1.3 / max(fan, 1) ** 0.5))
            else:
                weight.add_(noise * 0.1)
        still = {name: p for name, p in module.named_parameters(recurse=False) if not p.requires_grad}
        for name, buffer in {**dict(module.named_buffers(recurse=False)), **still}.items():
            is_bias = name.endswith(("bias", "biases")) and buffer.numel() == max(buffer.shape)  # GPT's are masks
            if name in ("running_mean", "running_var") or is_bias:
                buffer.add_(torch.rand(buffer.shape, generator=generator).to(buffer))


def settle_(model: PreTrainedModel, feeds: list[Feed]) -> None:
    """Running statistics not far from what batch norms read: with others, one norm after another drowns the input in
    what is the same for all of them."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, kind) and module.running_mean is not None]
    momentum = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.train().momentum = SETTLED
        if norms:
            observed(model, feeds)
    finally:
        for norm, before in zip(norms, momentum, strict=True):
            norm.eval().momentum = before


def instance(
    model_type: str | PreTrainedConfig, cls: type[PreTrainedModel] | None = None, dtypes: Iterable[torch.dtype] = DTYPES
) -> PreTrainedModel:
    """A small random model of a type, or of a config, that runs: in float64, or else in float32.

    Raises:
        ValueError: none builds and runs; the message says why each candidate does not.
    """
    reasons: list[str] = []
    partial: list[PreTrainedModel] = []  # models that run, but not as a whole
    with quiet():
        config = _config(model_type)
        for attempt, first in _attempts(config, [cls] if cls else _classes(config), dtypes, reasons):
            if first.method == "forward":
                return attempt
            partial.append(attempt)
    if partial:
        return partial[0]
    raise ValueError("\n".join([f"No small instance of {config.model_type!r} runs:", *reasons]))


def _classes(config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The first classes of a config's type: its own architectures, then the most telling."""
    import transformers

    names = dict.fromkeys([*(config.architectures or ()), *classes_of(config.model_type)])
    found = (getattr(transformers, name, None) for name in names)
    return [cls for cls in found if cls is not None][:3]


def _attempts(
    config: PreTrainedConfig,
    classes: list[type[PreTrainedModel]],
    dtypes: Iterable[torch.dtype],
    reasons: list[str],
) -> Iterator[tuple[PreTrainedModel, Feed]]:
    """Models that run and the first feed of each, the best first; each failure adds a line to the reasons."""
    end = time.monotonic() + SECONDS
    for cls in classes:
        for number, (small, reason) in enumerate(candidates(config)):
            for dtype in dtypes:
                if small is None:
                    break
                try:
                    model = _sized(cls, small, dtype)
                    found = feeds(model)
                    settle_(model, found)
                    yield model, found[0]
                    reason = "forward does not run"
                except Exception as error:  # whatever a class dislikes
                    reason = reason_of(error)
                if time.monotonic() > end:
                    reasons.append(f"{cls.__name__}, size {number}: {reason}; no time for more")
                    return
            reasons.append(f"{cls.__name__}, size {number}: {reason}")


def _config(model_type: str | PreTrainedConfig) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]() if isinstance(model_type, str) else model_type


def _sized(cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    count = sum(weight.numel() for weight in build(cls, config, "meta", dtype).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f}M parameters")
    model = build(cls, config, dtype=dtype)
    randomize_(model)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of transformers and torch about unusual sizes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
