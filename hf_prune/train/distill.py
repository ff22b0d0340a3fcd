"""Losses between a pruned model and its teacher.

Shapes: B examples, T tokens, D hidden width, V classes or vocabulary, n rows, L layers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ..model.anatomy import quiet
from ..model.batches import Batch, forward_inputs, prepare, token_mask
from ..config import DistillationConfig
from ..model.families import family_for
from ..score.losses import has_head, is_causal_lm, predictions
from ..plan import SiteKey
from ..model.sites import consumer, find_sites

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

CHUNK_CPU, CHUNK_GPU = 2**20, 2**26  # logits of which the divergence is formed at a time: what a CPU's cache holds
LOGITS = "teacher_logits"  # the column that `with_teacher_logits` adds
HIDDEN = "hidden"
ATTENTION = ("attention", "cross_attention")


# --- maths -----------------------------------------------------------------------------------------------------------


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, chunk: int | None = None
) -> torch.Tensor:
    """KL(teacher, student) at a temperature, times its square, mean over rows. student, teacher: [n, V] -> scalar.

    Formed in fp32, `chunk` logits at a time and its gradient with it, so that nothing as wide as the vocabulary is kept
    but the logits and that gradient (Hinton et al. 2015, section 2). A row of one value is a regression: its squared
    error.
    """
    if not len(student):
        return student.sum() * 0.0
    if student.shape[-1] == 1:
        return functional.mse_loss(student.float(), teacher.float())
    chunk = chunk or (CHUNK_CPU if student.device.type == "cpu" else CHUNK_GPU)
    return _Divergence.apply(student, teacher, temperature, max(chunk // student.shape[-1], 1))


class _Divergence(torch.autograd.Function):
    """t² Σ p log(p/q) / n and its gradient t (q - p) / n, p and q the teacher's and student's softmax at t."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, t: float, rows: int) -> torch.Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for some, others, slot in zip(student.split(rows), teacher.split(rows), gradient.split(rows), strict=True):
            ours, theirs = (some.float() / t).log_softmax(-1), (others.float() / t).log_softmax(-1)
            p = theirs.exp()
            total += theirs.sub_(ours).mul_(p).sum()
            slot.copy_(ours.exp_().sub_(p).mul_(t / len(student)))
        ctx.save_for_backward(gradient)
        return total * t**2 / len(student)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


def relative_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Squared error over the teacher's mean square, at real tokens. [B, T, D], [B, T, D], [B*T] -> scalar.

    Relative, so that one weight serves models and layers whose states differ by orders of magnitude.
    """
    ours, theirs = (x.reshape(-1, x.shape[-1]).float() for x in (student, teacher))
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    return (ours - theirs).square().mean() / theirs.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def layer_map(student: int, teacher: int, given: Sequence[int] | None) -> list[int]:
    """The teacher's layer for each of the student's.

    Raises:
        ValueError: a given map of another length, or to layers that the teacher has not; a teacher less deep.

    >>> layer_map(3, 6, None)
    [1, 3, 5]
    """
    if given is not None:
        if len(given) != student or not all(0 <= layer < teacher for layer in given):
            raise ValueError(
                f"layer_map={list(given)}: give one of the teacher's layers 0..{teacher - 1} for each of the "
                f"student's {student}."
            )
        return list(given)
    if teacher < student:
        raise ValueError(
            f"The teacher has {teacher} layers, the student {student}: give layer_map, or set hidden_weight=0 and "
            "attention_weight=0."
        )
    return [(i + 1) * teacher // student - 1 for i in range(student)]


# --- a student and its teacher ---------------------------------------------------------------------------------------


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, config: DistillationConfig) -> None:
    """Raise ValueError unless the teacher has the student's label or vocabulary space, and its hidden width."""
    ours, theirs = student.config, teacher.config
    words = student.get_output_embeddings() is not None
    space = (lambda c: c.get_text_config().vocab_size) if words else (lambda c: c.num_labels)
    what = "vocabulary" if words else "label space"
    if config.logits_weight and space(ours) != space(theirs):
        raise ValueError(
            f"The teacher has another {what}: {space(theirs)} entries, the student has {space(ours)}. Give a teacher "
            "of the same task, or set logits_weight=0."
        )
    if config.logits_weight and not words and _named(ours) and _named(theirs) and ours.id2label != theirs.id2label:
        raise ValueError(
            f"The teacher has another label space: {theirs.id2label}, the student {ours.id2label}. Give a teacher with "
            "the same labels in the same order, or set logits_weight=0."
        )
    _check_inputs(student, teacher)
    if config.logits_weight:
        _check_heads(student, teacher)
    if config.hidden_weight or config.attention_weight:
        _check_depth(student, teacher, config)
        a, b = ours.get_text_config().hidden_size, theirs.get_text_config().hidden_size
        if a != b:
            raise ValueError(
                f"The teacher's hidden states are {b} wide, the student's {a}: they cannot be compared. Set "
                "hidden_weight=0 and attention_weight=0."
            )


def _check_inputs(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
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
    """Raise ValueError unless both have a head, and heads of one kind as far as their names say it."""
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
    ours, theirs = _depths(student), _depths(teacher)
    for stack, depth in ours.items():
        if stack not in theirs:
            raise ValueError(f"The teacher has no {stack}. Set hidden_weight=0 and attention_weight=0.")
        layer_map(depth, theirs[stack], config.layer_map)


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Layers of each stack."""
    layers = {(site.stack, site.layer) for site in find_sites(model, family_for(model.config.model_type))}
    return Counter(stack for stack, _ in layers)


def _named(config: Any) -> bool:
    """Whether the labels have names of their own, not LABEL_0, LABEL_1, ..."""
    return any(name != f"LABEL_{i}" for i, name in config.id2label.items())


@contextlib.contextmanager
def watched(model: PreTrainedModel, hidden: bool, attention: bool) -> Iterator[dict[SiteKey, torch.Tensor]]:
    """What a model's layers and attention sublayers give in its latest forward pass, by (stack, layer, kind)."""
    seen: dict[SiteKey, torch.Tensor] = {}

    def keep(key: SiteKey) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[key] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    sites = find_sites(model, family_for(model.config.model_type)) if hidden or attention else []
    layers = {(site.stack, site.layer, HIDDEN): model.get_submodule(site.path) for site in sites if hidden}
    sublayers = {site.key: consumer(model, site) for site in sites if attention and site.is_attention}
    handles = [module.register_forward_hook(keep(key)) for key, module in (layers | sublayers).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def with_teacher_logits(
    data: Dataset,
    teacher: PreTrainedModel,
    data_collator: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int = 32,
) -> Dataset:
    """The data with a column of the teacher's logits, kept on disk by `datasets`: no teacher runs for them in training.

    For classifiers, and for language models of small vocabulary on rows of one length: the column holds every logit.
    """

    def logits(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        examples = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        batch = prepare(teacher, data_collator(examples), torch.zeros(len(examples)))
        with quiet(teacher), torch.no_grad():
            return {LOGITS: teacher(**forward_inputs(teacher, batch)).logits.float().cpu().numpy()}

    return data.map(logits, batched=True, batch_size=batch_size, desc="teacher")


class Distillation:
    """A frozen teacher, and the loss that it gives for a batch that the student has just seen.

    Without a teacher the logits come with the batch, see `with_teacher_logits`.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel | None, config: DistillationConfig) -> None:
        self.config = config
        self.teacher = teacher
        if teacher is not None:
            check_teacher(student, teacher, config)
            teacher.eval().requires_grad_(False)
            if config.teacher_dtype:
                teacher.to(getattr(torch, config.teacher_dtype))

    def watched(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[dict[SiteKey, torch.Tensor]]:
        return watched(model, bool(self.config.hidden_weight), bool(self.config.attention_weight))

    def loss(
        self,
        student: PreTrainedModel,
        output: Any,
        batch: Batch,
        ours: Mapping[SiteKey, torch.Tensor],
        logits: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, int]:
        """The weighted sum of the terms, each a mean over the batch's labelled (logits) or real tokens; scalar.

        Args:
            ours: what `watched` saw of the student in the same forward pass.
            logits: the teacher's, where they are known.

        Returns:
            The loss, and how many rows the batch labels.
        """
        predicted = predictions(student, output, batch)
        given: Any = SimpleNamespace(logits=logits)
        theirs: Mapping[SiteKey, torch.Tensor] = {}
        if self.teacher is not None:
            inputs = {k: v.to(self.teacher.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
            with torch.no_grad(), self.watched(self.teacher) as theirs:
                given = self.teacher(**forward_inputs(self.teacher, replace(batch, inputs=inputs)))
        terms = []
        if self.config.logits_weight:
            pairs = zip(predicted, predictions(student, given, batch), strict=True)
            each = [divergence(a, b, self.config.temperature) for a, b in pairs]
            terms.append(self.config.logits_weight * torch.stack(each).mean())
        for kind, weight in (("hidden", self.config.hidden_weight), ("attention", self.config.attention_weight)):
            if weight:
                each = [relative_error(a, b, m) for a, b, m in self._pairs(student, batch, kind, ours, theirs)]
                terms.append(weight * torch.stack(each).mean())
        return torch.stack(terms).sum(), sum(map(len, predicted))

    def _pairs(self, student: Any, batch: Batch, kind: str, ours: Any, theirs: Any) -> Iterator[tuple[Any, Any, Any]]:
        """(student's, teacher's, mask) for every layer."""
        wanted = (HIDDEN,) if kind == "hidden" else ATTENTION
        for stack, site in dict.fromkeys((key[0], key[2]) for key in ours if key[2] in wanted):
            depth, other_depth = (sum(key[0] == stack and key[2] == site for key in seen) for seen in (ours, theirs))
            mask = token_mask(student, batch, stack)
            for layer, other in enumerate(layer_map(depth, other_depth, self.config.layer_map)):
                yield ours[stack, layer, site], theirs[stack, other, site], mask
