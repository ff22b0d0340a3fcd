"""Whether a student can learn from a teacher."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.history import history_of
from ..config import DistillationConfig
from ..model.lookup import family_of
from ..model.sites import find_sites
from ..model.wide import HIDDEN as STREAM
from ..score.losses import has_head, is_causal_lm
from .distill import layer_map

WIDTHS = ("hidden_size", "hidden_sizes", "depth_multiplier")  # the last ones of models of stages, and of MobileNet


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, config: DistillationConfig) -> None:
    """Raise ValueError unless the student can learn from the teacher what the settings ask for.

    Both must read the same inputs. For its logits the teacher needs the same kind of head and the same labels or
    vocabulary, for its hidden states and attention enough layers and the same hidden width, or the one that the
    student's was cut from.
    """
    if config.logits_weight:
        _check_space(student, teacher)
    _check_inputs(student, teacher)
    if config.logits_weight:
        _check_heads(student, teacher)
    if config.hidden_weight or config.attention_weight:
        _check_depth(student, teacher, config)
        _check_width(student, teacher)


def _check_space(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where the logits mean other labels or other words."""
    ours, theirs = student.config, teacher.config
    words = student.get_output_embeddings() is not None
    space = (lambda c: c.get_text_config().vocab_size) if words else (lambda c: c.num_labels)
    what = "vocabulary" if words else "label space"
    if space(ours) != space(theirs):
        raise ValueError(
            f"The teacher has another {what}: {space(theirs)} entries, the student has {space(ours)}. Give a teacher "
            "of the same task, or set logits_weight=0."
        )
    if not words and _are_named(ours) and _are_named(theirs) and ours.id2label != theirs.id2label:
        raise ValueError(
            f"The teacher has another label space: {theirs.id2label}, the student {ours.id2label}. Give a teacher with "
            "the same labels in the same order, or set logits_weight=0."
        )


def _are_named(config: Any) -> bool:
    """Whether the labels have names of their own, not LABEL_0, LABEL_1, ..."""
    return any(name != f"LABEL_{i}" for i, name in config.id2label.items())


def _check_inputs(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where the teacher cannot read the student's batches."""
    if student.main_input_name != teacher.main_input_name:
        raise ValueError(
            f"The teacher ({type(teacher).__name__}) reads {teacher.main_input_name}, the student "
            f"{student.main_input_name}. Give a teacher of the same task."
        )
    for what in ("vocab_size", "image_size"):
        ours, theirs = (getattr(model.config.get_text_config(), what, None) for model in (student, teacher))
        differs = ours != theirs if what == "image_size" else (ours or 0) > (theirs or 0)  # a vocabulary may be padded
        if ours is not None and theirs is not None and differs:
            raise ValueError(
                f"The teacher's {what} is {theirs}, the student's {ours}: it cannot read what the student reads. Give "
                "a teacher of the same tokenizer or image processor."
            )


def _check_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError unless both models have a head, and the names of their classes speak of the same kind."""
    for who, model in (("teacher", teacher), ("student", student)):
        if not has_head(model):
            raise ValueError(
                f"The {who} ({type(model).__name__}) has no head, so it gives no logits. Give one with a head, or set "
                "logits_weight=0."
            )
    ours, theirs = _head(student), _head(teacher)
    if ours and theirs and not ours.startswith(theirs) and not theirs.startswith(ours):
        raise ValueError(
            f"The teacher ({type(teacher).__name__}) has another head than the student ({type(student).__name__}). "
            "Give a teacher of the same task, or set logits_weight=0."
        )


def _head(model: PreTrainedModel) -> str:
    return "CausalLM" if is_causal_lm(model) else type(model).__name__.partition("For")[2]


def _check_depth(student: PreTrainedModel, teacher: PreTrainedModel, config: DistillationConfig) -> None:
    """Raise ValueError where a layer of the student has no layer of the teacher to learn from."""
    ours, theirs = _depths(student), _depths(teacher)
    for stack, depth in ours.items():
        if stack not in theirs:
            raise ValueError(f"The teacher has no {stack}. Set hidden_weight=0 and attention_weight=0.")
        layer_map(depth, theirs[stack], config.layer_map)


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """How many layers each stack has."""
    layers = {(site.stack, site.layer) for site in find_sites(model, family_of(model).layered)}
    return Counter(stack for stack, _ in layers)


def _check_width(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raise ValueError where hidden states cannot be compared."""
    ours, theirs = map(_width, (student, teacher))
    if ours != theirs and channels_in(student, theirs) is None:
        raise ValueError(
            f"The teacher's hidden states are {theirs} wide, the student's {ours}, and no plan says which channels "
            "those are: they cannot be compared. Set hidden_weight=0 and attention_weight=0."
        )


def _width(model: PreTrainedModel) -> Any:
    """What the config says of the width of the hidden states: a number, or one for each stage."""
    config = model.config.get_text_config()
    said = (getattr(config, key, None) for key in WIDTHS)
    return next((width for width in said if width is not None), None)


def channels_in(student: PreTrainedModel, width: int) -> list[int] | None:
    """The channels of a teacher's stream that a narrower student has kept of it; None: no plan says so."""
    earlier = history_of(student)
    kept = earlier and earlier.plan.get(STREAM)
    return list(kept.kept) if kept and kept.of == width else None
