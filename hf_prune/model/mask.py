"""A model as a plan would leave it, by masks: the same outputs as after the cut, at the dense cost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..plan import PruningPlan
from .anatomy import Anatomy
from .cut import index_of
from .silence import skipped, zeroed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def masked(model: PreTrainedModel, anatomy: Anatomy, plan: PruningPlan) -> Iterator[None]:
    """What reads a removed unit reads zeros, and a removed layer hands its input on. All is as before afterwards.

    Tokens that go are not masked: compare the logits at those that stay. Nor are hidden channels: without them norms
    see other statistics.
    """
    plan.check(anatomy.model_type, anatomy.words)
    with contextlib.ExitStack() as stack:
        for site in anatomy.sites:
            chosen, layer = plan.get(site.key), model.get_submodule(site.path)
            if chosen is None:
                continue
            left = site.expand(chosen.axis, chosen.kept)
            for part in (part for part in site.parts if part.role == "reads"):
                stack.enter_context(zeroed(layer, part.tensor, index_of(part, left, site.sizes, site.widths), part.dim))
        for extent in anatomy.extents:
            layers = plan.layers(extent.where[0], extent.of) if extent.path else range(extent.of)
            for gone in sorted({*range(extent.of)} - {*layers}):
                stack.enter_context(skipped(model.get_submodule(f"{extent.path}.{gone}")))
        yield
