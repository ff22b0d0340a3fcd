"""What PruningTrainer learns from: the teacher, and its share of the loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, Trainer

from .arguments import opened
from ..model.batches import forward_inputs, prepare
from .distill import LOGITS, Distillation

if TYPE_CHECKING:
    Mixed = Trainer  # what the mixin may rely on
else:
    Mixed = object


class TeachingMixin(Mixed):
    """The task loss and a teacher's, in a Trainer of any kind."""

    model: Any
    distillation: Any
    _teacher: PreTrainedModel | None
    _distiller: Distillation | None
    _seen: Any  # what the student's layers gave in the latest forward pass

    def _plain(self) -> Any:
        """The transformers model inside whatever wraps it, adapters included."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _teach(self) -> None:
        """Make the teacher ready; without one of its own, the model teaches as it is now."""
        if self.distillation is None or self._distiller is not None:
            return
        model = self._plain()
        known = LOGITS in (getattr(self.train_dataset, "column_names", None) or ())
        if known and not self.distillation.hidden_weight and not self.distillation.attention_weight:
            self._distiller = Distillation(model, None, self.distillation)
            return
        if self._teacher is None and self.distillation.teacher:
            self._teacher = opened(type(model), self.distillation.teacher, "DistillationConfig.teacher")
        teacher: Any = self._teacher
        if teacher is None:
            teacher = copy.deepcopy(model)
            teacher.__dict__.pop("forward", None)  # of a trainer that wraps it: bound to the student still
        self._distiller = Distillation(model, teacher.to(model.device), self.distillation)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        """Keep what the layers of the student give, where a teacher is to compare it."""
        if self._distiller is None:
            yield
            return
        with self._distiller.watched(self._plain()) as self._seen:
            yield

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task loss, and what the teacher adds while training, scaled alike for gradient accumulation."""
        inputs = dict(inputs)
        logits = inputs.pop(LOGITS, None)
        if self._distiller is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        student = self._plain()
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        batch = prepare(student, tensors, torch.zeros(1))
        total: Any = 0.0
        output = None
        if self.distillation.task_weight:
            loss_of: Any = super().compute_loss
            stock = loss_of.__func__ is Trainer.compute_loss  # others may give no logits to learn by
            task = loss_of(model, dict(inputs), stock, num_items_in_batch)
            task, output = task if stock else (task, None)
            total = self.distillation.task_weight * task
        if output is None:
            output = model(**forward_inputs(student, batch))
        with self.accelerator.autocast():  # which wraps the student alone
            taught, rows = self._distiller.loss(student, output, batch, self._seen, logits)
        total = total + self._part(rows, num_items_in_batch) * taught
        return (total, output) if return_outputs else total

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if LOGITS not in columns:
            columns.append(LOGITS)

    def _part(self, rows: int, num_items_in_batch: Any) -> Any:
        """What share of the accumulated batch's mean a batch of so many labelled tokens makes up."""
        if num_items_in_batch is None or not (self.model_accepts_loss_kwargs or self.compute_loss_func):
            return 1.0  # the stock training step divides by the number of batches
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return rows * ranks / num_items_in_batch
