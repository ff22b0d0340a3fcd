"""A model as a plan would leave it, by masks: the same outputs as after the cut, at the dense cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..plan import PruningPlan
from .anatomy import Anatomy
from .offload import check_in_memory
from .silence import skipped, without

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def masked(model: PreTrainedModel, anatomy: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """What reads a removed unit reads zeros, and a removed layer hands its input on. All is as before afterwards.

    Tokens that go are not masked: compare the logits at those that stay. Nor are hidden channels: without them norms
    see other statistics.

    Raises:
        ValueError: a plan for another model, or offloaded weights.
    """
    check_in_memory(model, "Masks are put on the weights themselves")
    plan.check(anatomy.model_type, anatomy.words)
    with contextlib.ExitStack() as stack:
        for site in anatomy.sites:
            chosen = plan.get(site.key)
            if chosen is not None:
                left = site.expand(chosen.axis, chosen.kept)
                stack.enter_context(without(model.get_submodule(site.path), site, left))
        for extent in anatomy.extents:
            layers = plan.layers(extent.where[0], extent.of) if extent.path else range(extent.of)
            for gone in sorted({*range(extent.of)} - {*layers}):
                stack.enter_context(skipped(model.get_submodule(extent.layers[gone])))
        yield
