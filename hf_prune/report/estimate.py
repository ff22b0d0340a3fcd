"""Time and memory of a cut before it is made: one timed batch, and arithmetic.

B examples, T tokens, D hidden width, K columns of the widest consumer, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ..model.batches import forward_inputs
from ..model.offload import device_of
from ..model.weights import quiet
from ..oneshot import Analysis
from ..score.criteria import CRITERIA
from ..score.passes import LOGITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPAIR_PASSES = {
    "least_squares": 6.0,
    "rescale": 5.0,
    "bias": 4.0,
    "none": 0.0,
}  # forward passes over the calibration data, measured
STATES = 5  # tensors [B, T, D] per example besides the dense stream: the pruned stream, and a layer's targets
SAVED_HIDDEN, SAVED_WIDE = 12, 6  # activations of the one layer in a backward pass: [B, T, D] and [B, T, K]
GRAMS = 4  # matrices [K, K] in fp32: calibration, held-out, and a solve's workspace


def cut_seconds(model: PreTrainedModel, analysis: Analysis) -> float:
    """Seconds to cut and repair once: passes per repair x a forward pass, which is timed on the middle batch."""
    middle, device = analysis.batches[len(analysis.batches) // 2], device_of(model)
    with quiet(model), torch.inference_mode():
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            model(**forward_inputs(model, middle))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - started
    examples = sum(batch.size for batch in analysis.batches)
    return REPAIR_PASSES[analysis.config.repair] * taken * examples / middle.size


def peak_bytes(model: PreTrainedModel, analysis: Analysis, copies: int = 1) -> float:
    """Bytes of the weights, the calibration states (beyond the size of the weights they lie in a file) and the larger
    of a scoring batch and the normal equations."""
    anatomy, size = analysis.anatomy, model.dtype.itemsize
    tokens = [_tokens(analysis, i) for i in range(len(analysis.batches))]
    widest = max(site.columns for site in anatomy.sites)
    stacks = len({site.stack for site in anatomy.sites})
    one = sum(p.numel() * p.element_size() for p in model.parameters())
    states = min((stacks + STATES) * sum(tokens) * anatomy.hidden_size * size, one)
    grams = GRAMS * 4 * widest**2
    return copies * one + max(_scoring_bytes(model, analysis, max(tokens), widest), states + grams)


def _tokens(analysis: Analysis, index: int) -> int:
    batch = analysis.batches[index]
    ids = batch.inputs.get("input_ids")
    return analysis.anatomy.tokens(ids.shape[1] if ids is not None else 1) * batch.size


def _scoring_bytes(model: PreTrainedModel, analysis: Analysis, tokens: int, widest: int) -> float:
    if not CRITERIA[str(analysis.config.criterion)].needs_loss:
        return 0
    layers = len({site.path for site in analysis.anatomy.sites})
    saved = (layers + SAVED_HIDDEN) * analysis.anatomy.hidden_size + SAVED_WIDE * widest
    head = model.get_output_embeddings()
    logits = min(tokens * head.weight.shape[0], LOGITS) if head is not None else 0
    return tokens * saved * model.dtype.itemsize + 3 * 4 * logits
