"""What a pruned model learns from besides its labels: a teacher, or the logits that one left in the data.

Shapes: B examples, T tokens, D hidden width, V classes or vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..config import DistillationConfig
from ..model.batches import Batch, forward_inputs, prepare, token_mask
from ..model.lookup import family_of
from ..model.sites import consumer, find_sites
from ..model.weights import quiet
from ..plan import Where
from ..score.losses import predictions
from .arguments import opened
from .distill import divergence, layer_map, relative_error
from .fit import channels_in, check_teacher

if TYPE_CHECKING:
    from datasets import Dataset

Seen = Mapping[Where, torch.Tensor]  # (stack, layer, kind) -> what it gave, [B, T, D]
LOGITS = "teacher_logits"  # the column that `with_teacher_logits` adds
HIDDEN = "hidden"
ATTENTION = ("attention", "cross_attention")


class Teacher:
    """A frozen model, and the loss that it gives for a batch which the student has just seen.

    Args:
        student: the model that learns, to check that the teacher fits it.
        model: the teacher; None where its logits come with each batch (see `with_teacher_logits`).

    Raises:
        ValueError: see `check_teacher`.
    """

    def __init__(self, student: PreTrainedModel, model: PreTrainedModel | None, config: DistillationConfig) -> None:
        self.config = config
        self.model = model
        self._seen: Seen = {}  # what the student's layers gave in its latest forward pass
        if model is not None:
            check_teacher(student, model, config)
            model.eval().requires_grad_(False)
            if config.teacher_dtype:
                model.to(getattr(torch, config.teacher_dtype))

    @classmethod
    def of(
        cls, student: PreTrainedModel, given: PreTrainedModel | None, config: DistillationConfig, data: Any
    ) -> Teacher:
        """The teacher that a trainer was given, else the one that its settings name, else the student as it is now.

        Raises:
            ValueError: the named one does not open, or the teacher does not fit (see `check_teacher`).
        """
        has_logits = LOGITS in (getattr(data, "column_names", None) or ())
        if has_logits and not config.hidden_weight and not config.attention_weight:
            return cls(student, None, config)
        if given is None and config.teacher:
            given = opened(type(student), config.teacher, "DistillationConfig.teacher")
        model: Any = _copy(student) if given is None else given
        return cls(student, model.to(student.device), config)

    def watched(self, model: PreTrainedModel) -> contextlib.AbstractContextManager[Seen]:
        """What the layers of a model give in its latest forward pass, as far as this teacher's losses compare it."""
        return watched(model, bool(self.config.hidden_weight), bool(self.config.attention_weight))

    @contextlib.contextmanager
    def watching(self, student: PreTrainedModel) -> Iterator[None]:
        """Watch the student, for `lesson`."""
        with self.watched(student) as self._seen:
            yield

    def lesson(
        self, model: Any, student: PreTrainedModel, inputs: Mapping[str, Any], logits: torch.Tensor | None, output: Any
    ) -> tuple[torch.Tensor, int, Any]:
        """What a batch teaches the student, which must be watched in the meantime.

        Args:
            model: the student as the trainer calls it; `student` is the transformers model inside.
            inputs: the batch as the trainer gives it to the model.
            logits: the teacher's, where they come with the batch.
            output: what the student gave for the batch; None: it is run here.

        Returns:
            The loss, how many rows the batch labels (both as `loss` gives them), and the student's output.
        """
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        batch = prepare(student, tensors, torch.zeros(1))
        if output is None:
            output = model(**forward_inputs(student, batch))
        loss, rows = self.loss(student, output, batch, self._seen, logits)
        return loss, rows, output

    def loss(
        self, student: PreTrainedModel, output: Any, batch: Batch, ours: Seen, logits: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, int]:
        """The weighted sum of the terms, each a mean over the batch's labelled tokens (logits) or real ones (states).

        Args:
            output: what the student gave for the batch.
            ours: what its layers gave in the same forward pass, see `watched`.
            logits: the teacher's, where they are known: [B, V] or [B, T, V].

        Returns:
            The loss, a scalar, and how many rows the batch labels.
        """
        predicted = predictions(student, output, batch)
        given, theirs = self._taught(batch, logits)
        terms = []
        if self.config.logits_weight:
            pairs = zip(predicted, predictions(student, given, batch), strict=True)
            each = [divergence(a, b, self.config.temperature) for a, b in pairs]
            terms.append(self.config.logits_weight * torch.stack(each).mean())
        states = (((HIDDEN,), self.config.hidden_weight), (ATTENTION, self.config.attention_weight))
        for kinds, weight in states:
            if weight:
                each = [relative_error(*pair) for pair in self._pairs(student, batch, kinds, ours, theirs)]
                terms.append(weight * torch.stack(each).mean())
        return torch.stack(terms).sum(), sum(map(len, predicted))

    def _taught(self, batch: Batch, logits: torch.Tensor | None) -> tuple[Any, Seen]:
        """The teacher's output for a batch, and what its layers gave."""
        if self.model is None:
            return SimpleNamespace(logits=logits), {}
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in batch.inputs.items()}
        with torch.no_grad(), self.watched(self.model) as seen:
            return self.model(**forward_inputs(self.model, replace(batch, inputs=inputs))), seen

    def _pairs(
        self, student: Any, batch: Batch, kinds: tuple[str, ...], ours: Seen, theirs: Seen
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """(the student's states, the teacher's, which tokens count) of every layer, for `relative_error`."""
        for stack, kind in dict.fromkeys((key[0], key[2]) for key in ours if key[2] in kinds):
            depth, other_depth = (sum((key[0], key[2]) == (stack, kind) for key in seen) for seen in (ours, theirs))
            mask = token_mask(student, batch, stack)
            for layer, other in enumerate(layer_map(depth, other_depth, self.config.layer_map)):
                yield (
                    ours[stack, layer, kind],
                    _alike(student, ours[stack, layer, kind], theirs[stack, other, kind]),
                    mask,
                )


def _alike(student: PreTrainedModel, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The teacher's states at the channels that a narrower student has."""
    if ours.shape[-1] == theirs.shape[-1]:
        return theirs
    return theirs[..., channels_in(student, theirs.shape[-1])]


def _copy(student: PreTrainedModel) -> PreTrainedModel:
    teacher = copy.deepcopy(student)
    teacher.__dict__.pop("forward", None)  # of a trainer that wraps it: still bound to the student
    return teacher


# --- what a forward pass gives ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def watched(model: PreTrainedModel, hidden: bool, attention: bool) -> Iterator[dict[Where, torch.Tensor]]:
    """Keep what the layers (`hidden`) and attention sublayers of a model give in its latest forward pass.

    Yields:
        A dict that each forward pass fills anew: (stack, layer, kind) -> [B, T, D].
    """
    seen: dict[Where, torch.Tensor] = {}

    def keep(key: Where) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            seen[key] = output if isinstance(output, torch.Tensor) else output[0]

        return hook

    sites = find_sites(model, family_of(model).layered) if hidden or attention else []
    layers = {(site.stack, site.layer, HIDDEN): model.get_submodule(site.path) for site in sites if hidden}
    sublayers = {site.key: consumer(model, site) for site in sites if attention and site.inner.mixes}
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
    """The data with a column of the teacher's logits, so that training on them runs no teacher.

    `datasets` keeps the column on disk. It holds every logit, so it suits classifiers, and language models with a small
    vocabulary whose rows all have the same length.
    """

    def logits(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
        examples = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
        batch = prepare(teacher, data_collator(examples), torch.zeros(len(examples)))
        with quiet(teacher), torch.no_grad():
            return {LOGITS: teacher(**forward_inputs(teacher, batch)).logits.float().cpu().numpy()}

    return data.map(logits, batched=True, batch_size=batch_size, desc="teacher")
