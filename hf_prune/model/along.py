"""Cut an axis that runs through the whole model: one loop over the tensors that it lies in, one real at a time.

Shapes: S kept units.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .configs import holders, put_in_
from .cut import index_of, say_sizes_, slice_
from .offload import real, share_, tie_again_
from .sites import Extent, module_of, tensor_of


def cut_wide_(model: nn.Module, extent: Extent, kept: Sequence[int]) -> None:
    """Remove all but the `kept` units of an axis of the whole model, in place; modules and configs then say the new
    number."""
    cut_along_(model, extent, kept)
    for path in extent.attributes:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, len(kept))
    for key in (extent.axis.config, *extent.axis.also):
        for config, name in holders(model, key):
            put_in_(config, name, len(kept))


def cut_along_(model: nn.Module, extent: Extent, kept: Sequence[int]) -> None:
    """Keep these units [S] in every tensor that an axis runs along, in place; tied tensors stay tied."""
    axis, done = extent.axis.name, dict[tuple[int, int], tuple[torch.Tensor, str]]()
    tie_again_(model)
    for part in extent.parts:
        old, (owner, _, name) = tensor_of(model, part.tensor), part.tensor.rpartition(".")
        module = model.get_submodule(owner)
        if (id(old), part.dim) in done:
            first = done[id(old), part.dim][1]
            share_(module, name, model.get_submodule(module_of(first)), first.rpartition(".")[2])
            say_sizes_(module)
        else:
            with real(module):
                slice_(model, part.tensor, index_of(part, {axis: kept}, {axis: extent.of}, {axis: 1}), part.dim)
            done[id(old), part.dim] = old, part.tensor  # the old one too: a freed id comes again
