"""What a PruningTrainer is given, checked before anything is changed."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..model.anatomy import check_model
from ..checkpoint.directory import resolved
from ..config import DistillationConfig, PruningConfig

KINDS = {"pruning": PruningConfig, "distillation": DistillationConfig, "peft_config": PeftConfig}


def check_kind(name: str, value: Any) -> None:
    """Raise TypeError for a setting of another type than its own."""
    if isinstance(value, KINDS[name]):
        return
    kind = KINDS[name].__name__
    found = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.60}"
    hint = f" Write {kind}(**{name})." if isinstance(value, dict) and name != "peft_config" else ""
    raise TypeError(f"{name}= takes a {kind}, got {found}.{hint}")


def check_student(model: Any) -> None:
    """Raise for a model that cannot be cut; a name is left to the trainer that may open it.

    Raises:
        ValueError: it has adapters. TypeError: a wrapper, or no transformers model.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            "The model has adapters, which cannot be cut. Merge them (model.merge_and_unload()), or give the plain "
            "model and peft_config=."
        )
    if model is not None and not isinstance(model, str):
        check_model(model)


def check_output(args: Any) -> None:
    """Raise unless `output_dir` can be replaced as a whole, as a save does it: see `resolved` for the errors."""
    if not isinstance(args, TrainingArguments):
        return
    try:
        resolved(str(args.output_dir))
    except (OSError, ValueError) as error:
        raise type(error)(f"output_dir, into which save_model() writes by default: {error}") from error


def check_own_teacher(student: Any, teacher: Any, distillation: Any) -> None:
    """Raise for a teacher that is no model of its own, or that nothing is to be learnt from."""
    if teacher is None:
        return
    if distillation is None:
        raise ValueError("teacher= without distillation=: give a DistillationConfig().")
    if not isinstance(teacher, nn.Module):
        raise TypeError(
            f"teacher= takes a model, got {type(teacher).__name__} {teacher!r:.60}. Name a directory or a Hub id in "
            "DistillationConfig(teacher=...)."
        )
    check_model(teacher)
    if teacher is student:
        raise ValueError(
            "teacher= is the model that is to be cut. Leave it out: a copy of the model as it is now then teaches."
        )


def check_adapters(model: PreTrainedModel, peft_config: PeftConfig) -> None:
    """Raise ValueError for adapters that do not fit a model, or that could not be merged. Tried without weights."""
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config={type(peft_config).__name__}: prompts are no weights of the model, and cannot be taken off "
            "for the next cut. Use adapters that merge (LoraConfig, ...)."
        )
    with torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    try:
        with warnings.catch_warnings():  # said when they are put on
            warnings.simplefilter("ignore")
            get_peft_model(empty, copy.deepcopy(peft_config))
    except Exception as error:  # of any kind, from peft
        raise ValueError(f"peft_config= does not fit {type(model).__name__}: {error}") from error


def opened(cls: Any, name: str | os.PathLike[str], what: str, **options: Any) -> Any:
    """A model of this class from a directory or the Hub, with all its weights.

    Raises:
        ValueError: nothing is there, another model's weights are, or not all of them.
    """
    try:
        model, found = cls.from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:  # of any kind: damaged files, other shapes, no network
        said = (str(error).strip() or repr(error)).splitlines()[0][:200]
        raise ValueError(f"{what} {os.fspath(name)!r} does not open as {cls.__name__}: {said}") from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{what} {os.fspath(name)!r} is no {cls.__name__}: it has no weights for {', '.join(missing[:3])}"
            f"{', ...' if missing[3:] else ''}."
        )
    return model


def check_early(model: PreTrainedModel, directory: str) -> None:
    """Raise ValueError unless `rewind_to` holds weights that can be put into the model to be cut."""
    check_shapes(model, opened(type(model), directory, "rewind_to", dtype=model.dtype), f"rewind_to={directory!r}")


def check_shapes(model: PreTrainedModel, other: PreTrainedModel, what: str) -> None:
    """Raise ValueError unless one model's weights can be put into another."""
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, other))
    wrong = next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)
    if wrong is not None:
        raise ValueError(
            f"{what} holds another model: {wrong} is {theirs.get(wrong)} there, {ours.get(wrong)} here. Name a "
            "checkpoint of this model's own training."
        )
