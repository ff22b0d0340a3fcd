"""Passes whose memory grows neither with the depth of a model nor with its vocabulary, and that give the same numbers.

In a backward pass each layer is run again, so that until then only its input is kept (Chen et al. 2016, "Training Deep
Nets with Sublinear Memory Cost", section 4). The logits of a language model are formed for a few tokens at a time.

Shapes: B examples, T tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ..model.batches import Batch, forward_inputs, is_causal_lm
from ..model.offload import is_offloaded, real
from ..model.patched import computing
from .losses import counted_labels, example_losses, labels_of, token_losses, with_drawn_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**23  # at a time: 32 MiB in fp32
KEEP = "logits_to_keep"  # argument of language models: the positions whose logits are wanted


@contextlib.contextmanager
def recomputed(layers: Collection[nn.Module]) -> Iterator[None]:
    """Run layers again in the backward pass instead of keeping what they compute."""
    with contextlib.ExitStack() as stack:
        # offloaded ones to their end, behind which hooks of accelerate's drop the weights that they have loaded
        stack.enter_context(set_checkpoint_early_stop(not any(map(is_offloaded, layers))))
        for layer in dict.fromkeys(layers):
            stack.enter_context(computing(layer, partial(checkpoint, layer.forward, use_reentrant=False)))
        yield


def backward(model: PreTrainedModel, batch: Batch, draw: torch.Generator | None = None) -> None:
    """The backward pass of the sum over examples of the task loss.

    Args:
        draw: draw the labels from the model's own predictions with this generator instead.
    """
    given = _before_head(model, batch) if draw is None and _is_wide(model, batch) else None
    if given is None:
        output = model(**forward_inputs(model, batch))
        labelled = batch if draw is None else with_drawn_labels(model, output, batch, draw)
        example_losses(model, output, labelled).sum().backward()
        return
    hidden = given.last_hidden_state
    given.last_hidden_state = leaf = hidden.detach().requires_grad_()
    for losses in _in_pieces(model, batch, given):
        losses.sum().backward()
    hidden.backward(leaf.grad)


@torch.no_grad()
def losses_of(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The task loss of each example [B], see `example_losses`."""
    given = _before_head(model, batch) if _is_wide(model, batch) else None
    if given is None:
        return example_losses(model, model(**forward_inputs(model, batch)), batch)
    return torch.stack([*_in_pieces(model, batch, given)]).sum(0)


def _is_wide(model: PreTrainedModel, batch: Batch) -> bool:
    """Whether the logits of a batch are formed piece by piece: a language model that can, and more than `LOGITS`."""
    head, labels = model.get_output_embeddings(), labels_of(model, batch)
    if head is None or labels is None or labels.dim() != 2 or not is_causal_lm(model):
        return False
    can = KEEP in inspect.signature(model.forward).parameters and model.base_model is not model
    return can and labels.numel() * head.weight.shape[0] > LOGITS


def _before_head(model: PreTrainedModel, batch: Batch) -> Any:
    """What the base model gives to the head; None where a class does not run it as a whole."""
    seen: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        model(**forward_inputs(model, batch), **{KEEP: 1})
    finally:
        handle.remove()
    return seen[0] if len(seen) == 1 and hasattr(seen[0], "last_hidden_state") else None


def _in_pieces(model: PreTrainedModel, batch: Batch, given: Any) -> Iterator[torch.Tensor]:
    """What a few positions at a time add to the loss of each example, [B].

    Args:
        given: what the base model gives, which is not run again.
    """
    head, base = model.get_output_embeddings(), model.base_model
    width = len(head.weight)
    labels = counted_labels(labels_of(model, batch)[:, 1:], width)  # type: ignore[index]
    count, step = (labels >= 0).sum(1).clamp_min(1), max(LOGITS // (batch.size * width), 1)
    with computing(base, lambda *args, **kwargs: given), real(head):  # loaded once for all
        for some in torch.arange(labels.shape[1], device=labels.device).split(step):
            logits = model(**forward_inputs(model, batch), **{KEEP: some}).logits
            yield token_losses(logits, labels[:, some]).sum(1) / count
