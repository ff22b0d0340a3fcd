"""Layers as units: fewer of them in a live model, and in its config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .configs import holder, keep_layers_, lists_along
from .sites import Extent

if TYPE_CHECKING:
    from .anatomy import Anatomy

BY_NUMBER = ("out_indices", "out_features", "scale_attn_by_inverse_layer_idx")  # keys by which layers are told apart


def check_droppable(model: Any, anatomy: Anatomy) -> None:
    """Raise ValueError where no layers can go, where a list in the config does not fit them, or where their numbers
    tell them apart."""
    config = model.config
    if not any(extent.path and extent.axis.config for extent in anatomy.extents):
        why = dict(anatomy.family.refused).get("layers", "no key of its config counts them")
        raise ValueError(
            f"units=['layers']: the layers of this {anatomy.model_type} must stay: {why}. Remove other units."
        )
    numbered = [key for key in BY_NUMBER if getattr(config, key, None)]
    if numbered and (numbered[0] not in BY_NUMBER[:2] or "Backbone" in type(model).__name__):
        raise ValueError(
            f"units=['layers']: {numbered[0]}={getattr(config, numbered[0])!r} of this {anatomy.model_type} reads "
            "layers by their numbers, which a cut would change. Remove other units."
        )
    stacks = [extent for extent in anatomy.extents if extent.path]
    lengths = {extent.of for extent in stacks}
    configs = {id(inside): inside for e in stacks if e.axis.config for inside in holder(config, e.axis.config)[:1]}
    for key, values in (each for inside in configs.values() for each in lists_along(inside)):
        if len(values) not in lengths:
            raise ValueError(
                f"units=['layers']: the config's {key} has {len(values)} entries, the model "
                f"{' and '.join(map(str, sorted(lengths)))} layers. Mend config.json, then open the model again."
            )


def drop_layers_(model: Any, extent: Extent, kept: Sequence[int]) -> None:
    """Keep only these layers of a stack, in place; numbers in the modules and in the configs follow."""
    layers = model.get_submodule(extent.path)
    owner, _, name = extent.path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ModuleList([layers[index] for index in kept]))
    for index, layer in enumerate(model.get_submodule(extent.path)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    config, name = holder(model.config, extent.axis.config)
    keep_layers_(config, name, kept)
    own = next((m.config for path, m in _up(model, extent.path) if hasattr(m, "config")), config)
    if own is not config and type(own) is type(
        config
    ):  # the copy that a stack holds calls its own layers `num_hidden_layers`
        own.num_hidden_layers = extent.of
        keep_layers_(own, "num_hidden_layers", kept)


def _up(model: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The modules above a path, from the innermost."""
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


@contextlib.contextmanager
def without_layers(model: Any, extent: Extent, kept: Sequence[int]) -> Iterator[None]:
    """The model with only these layers of a stack, for passes without a cache; all are back afterwards."""
    layers = model.get_submodule(extent.path)
    owner, _, name = extent.path.rpartition(".")
    parent = model.get_submodule(owner)
    config = holder(model.config, extent.axis.config)[0]
    before = dict(lists_along(config))
    try:
        setattr(parent, name, nn.ModuleList([layers[index] for index in kept]))
        for key, values in before.items():
            if len(values) == extent.of:
                setattr(config, key, [values[index] for index in kept])
        yield
    finally:
        setattr(parent, name, layers)
        for key, values in before.items():
            setattr(config, key, values)
