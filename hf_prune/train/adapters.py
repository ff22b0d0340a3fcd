"""Adapters (peft) on a pruned model: put on after each cut, merged before the next, saved beside its weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from ..checkpoint.proof import BASE


def plain(model: Any) -> Any:
    """The transformers model inside adapters; without any, the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(model: Any) -> Any:
    """The transformers model with its adapters merged into its weights, all of which train again."""
    return model.merge_and_unload().requires_grad_(True) if hasattr(model, "merge_and_unload") else model


def adapted(model: PreTrainedModel, config: PeftConfig | None) -> Any:
    """The model with fresh adapters, if there are to be any. peft changes a config that it is given: it gets a copy."""
    return model if config is None else get_peft_model(model, copy.deepcopy(config))


def check_adapters(model: PreTrainedModel, config: PeftConfig) -> None:
    """Raise ValueError for adapters that do not fit a model, or cannot be merged. They are tried on an empty copy."""
    if config.is_prompt_learning:
        raise ValueError(
            f"peft_config={type(config).__name__}: prompts are no weights of the model, and cannot be taken off "
            "for the next cut. Use adapters that merge (LoraConfig, ...)."
        )
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    try:
        with warnings.catch_warnings():  # peft says them again when the adapters are put on
            warnings.simplefilter("ignore")
            adapted(empty, config)
    except Exception as error:  # of any kind, from peft
        raise ValueError(f"peft_config= does not fit {type(model).__name__}: {error}") from error


# --- on disk ---------------------------------------------------------------------------------------------------------


def home_of(directory: Path) -> Path:
    """Where a checkpoint has the weights of the transformers model: in a folder of their own, if it has adapters."""
    return directory / BASE if (directory / BASE).is_dir() else directory


def save_base(model: Any, directory: Path) -> Path:
    """Save the weights that adapters belong to; returns where the weights of the transformers model are."""
    if not hasattr(model, "get_base_model"):
        return directory
    copy.deepcopy(model).unload().save_pretrained(directory / BASE)
    return directory / BASE


def opener_of(model: Any) -> Any:
    """What opens a save of this model by `from_pretrained`, adapters included."""
    return Opener(plain(model)) if hasattr(model, "get_base_model") else type(model)


class Opener:
    """Opens a directory that `save_base` and peft wrote: adapters on the pruned weights beside them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.cls = type(model)
        self.__name__ = f"{self.cls.__name__} with adapters"

    def from_pretrained(self, directory: Path, **options: Any) -> Any:
        return PeftModel.from_pretrained(self.cls.from_pretrained(directory / BASE, **options), str(directory))
