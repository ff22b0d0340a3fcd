"""What a PruningTrainer is given, checked before anything is changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..checkpoint.directory import resolved
from ..config import DistillationConfig, PruningConfig
from ..model.batches import even_positions
from ..model.offload import check_in_memory
from ..model.weights import check_model

KINDS = {"pruning": PruningConfig, "distillation": DistillationConfig, "peft_config": PeftConfig}


def check_given(model: Any, args: Any, pruning: Any, distillation: Any, teacher: Any, peft_config: Any) -> None:
    """Raise for arguments that cannot be used, before the stock trainer sees any of them.

    Raises:
        ValueError, TypeError: see the functions below.
    """
    for name, value in (("pruning", pruning), ("distillation", distillation), ("peft_config", peft_config)):
        if value is not None:
            check_kind(name, value)
    if pruning is not None:
        check_student(model)
        check_output(args)
        check_units(
            pruning,
            ("tokens",),
            "the training data are in the present tokens. Shorten the vocabulary with prune() first, tokenise with the "
            "processing_class of its result, and train that",
        )
    check_given_teacher(model, teacher, distillation)


def check_kind(name: str, value: Any) -> None:
    """Raise TypeError where a setting has another type than it should."""
    if isinstance(value, KINDS[name]):
        return
    kind = KINDS[name].__name__
    found = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.60}"
    hint = f" Write {kind}(**{name})." if isinstance(value, dict) and name != "peft_config" else ""
    raise TypeError(f"{name}= takes a {kind}, got {found}.{hint}")


def check_student(model: Any) -> None:
    """Raise for a model that cannot be cut. A name is not looked at: the trainer may open it.

    Raises:
        ValueError: it has adapters, or offloaded weights. TypeError: it is wrapped in another module, or is no
            transformers model.
    """
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            "The model has adapters, which cannot be cut. Merge them (model.merge_and_unload()), or give the plain "
            "model and peft_config=."
        )
    if model is not None and not isinstance(model, str):
        check_model(model)
        check_in_memory(model, "Training changes the weights themselves")


def check_units(pruning: PruningConfig, refused: Sequence[str], why: str) -> None:
    """Raise ValueError where units are asked for that cannot go while a model trains."""
    wrong = [unit for unit in pruning.units or () if unit in refused]
    if wrong:
        raise ValueError(f"units={pruning.units}: no {' or '.join(wrong)} here, since {why}.")


def check_output(args: Any) -> None:
    """Raise unless `output_dir` can be replaced as a whole, which is how a save writes it (see `resolved`)."""
    if not isinstance(args, TrainingArguments):
        return
    try:
        resolved(str(args.output_dir))
    except (OSError, ValueError) as error:
        raise type(error)(f"output_dir, into which save_model() writes by default: {error}") from error


def check_given_teacher(student: Any, teacher: Any, distillation: Any) -> None:
    """Raise for a `teacher=` that is no model, or is the student, or comes without a `distillation=`.

    Raises:
        ValueError, TypeError: see above.
    """
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
    check_in_memory(teacher, "The teacher is moved to where the student trains")
    if teacher is student:
        raise ValueError(
            "teacher= is the model that is to be cut. Leave it out: a copy of the model as it is now then teaches."
        )


def check_unsharded(asked: Mapping[str, Any]) -> None:
    """Raise ValueError where one of these ways to shard a model (name -> whether it is asked for) is in use."""
    name = next((name for name, is_asked in asked.items() if is_asked), None)
    if name:
        raise ValueError(
            f"A model that {name} shards cannot be cut. Cut it with hf_prune.prune() first and train the result "
            f"with pruning=None, or use plain data parallelism (torchrun without {name})."
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise ValueError for an optimizer that was made before the cut."""
    if optimizer is not None:
        raise ValueError(
            "optimizers=(...) holds the weights as they are before the cut. Give optimizer_cls_and_kwargs=, or "
            "TrainingArguments(optim=...)."
        )


def calibration_batches(
    name: str, data: Any, collate: Callable[[list[Any]], Any], size: int, config: PruningConfig
) -> list[Any]:
    """The calibration examples of a data set, in batches of `size`.

    Args:
        name: which argument the data are, for the error.
        data: examples by index, from which they are drawn evenly; or a stream, of which they are the first.

    Raises:
        ValueError: the data cannot be read, or the collator does not take their examples.
    """
    try:
        examples = _drawn(data, config)
        return [collate(examples[i : i + size]) for i in range(0, len(examples), size)]
    except Exception as error:  # of any kind, from the user's data and collator
        raise ValueError(
            f"{name} cannot be read as examples and collated ({type(error).__name__}: {error}). It is a Dataset, a "
            f"list or an iterable of examples that the trainer's data_collator takes; got {type(data).__name__}."
        ) from error


def _drawn(data: Any, config: PruningConfig) -> list[Any]:
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        return [data[i] for i in even_positions(len(data), config.calibration_samples, config.calibration_seed)]
    return list(itertools.islice(iter(data), config.calibration_samples))


# --- weights from a directory or the Hub -----------------------------------------------------------------------------


def opened(cls: Any, name: str | os.PathLike[str], what: str, **options: Any) -> Any:
    """A model of this class from a directory or the Hub, with all of its weights.

    Args:
        what: what the directory is, for the error.
        options: passed on to `from_pretrained`.

    Raises:
        ValueError: there is nothing to open, or it is another model, or some of its weights are missing.
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


def opened_like(model: PreTrainedModel, name: str | os.PathLike[str], what: str) -> PreTrainedModel:
    """As `opened`, of the class and dtype of another model."""
    found: PreTrainedModel = opened(type(model), name, what, dtype=model.dtype)
    return found


def check_early(model: PreTrainedModel, directory: str) -> None:
    """Raise ValueError unless `rewind_to` holds weights that fit into the model as it is before the cut."""
    check_shapes(model, opened_like(model, directory, "rewind_to"), f"rewind_to={directory!r}")


def check_shapes(model: PreTrainedModel, other: PreTrainedModel, what: str) -> None:
    """Raise ValueError unless the weights of `other` fit into the model."""
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, other))
    wrong = next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)
    if wrong is not None:
        raise ValueError(
            f"{what} holds another model: {wrong} is {theirs.get(wrong)} there, {ours.get(wrong)} here. Name a "
            "checkpoint of this model's own training."
        )
