"""Layers as units: fewer of them in a live model, and in its config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .configs import holder, keep_layers_, lists_along
from .offload import forget_
from .sites import Extent

PERIODS = ("decoder_sparse_step", "moe_layer_interval")  # keys that make every n-th layer another sort
BY_NUMBER = (  # keys by which layers are told apart
    "out_indices", "out_features", "scale_attn_by_inverse_layer_idx", "vision_feature_layer",
)  # fmt: skip


def check_droppable(model: Any, anatomy: Any) -> None:
    """Raise ValueError where no layers can go, where a list in the config does not fit them, or where their numbers
    tell them apart."""
    stacks = [extent for extent in anatomy.extents if extent.path and extent.axis.config]
    if not stacks:
        why = dict(anatomy.family.refused).get("layers", "no key of its config counts them")
        raise ValueError(
            f"units=['layers']: the layers of this {anatomy.model_type} must stay: {why}. Remove other units."
        )
    held = [model.config, *(_config_of(model, extent) for extent in stacks)]
    for config in {id(config): config for config in held}.values():
        _check_config(model, stacks, config, anatomy.model_type)


def _config_of(model: Any, extent: Extent) -> Any:
    """The config that a stack's layers are told by."""
    return holder(model.config, extent.axis.config)[0]


def _check_config(model: Any, stacks: Sequence[Extent], config: Any, model_type: str) -> None:
    numbered = [key for key in BY_NUMBER if getattr(config, key, None) not in (None, False, -1, [])]
    if numbered and (numbered[0] not in BY_NUMBER[:2] or "Backbone" in type(model).__name__):
        raise ValueError(
            f"units=['layers']: {numbered[0]}={getattr(config, numbered[0])!r} of this {model_type} reads "
            "layers by their numbers, which a cut would change. Remove other units."
        )
    periodic = [key for key in PERIODS if (getattr(config, key, None) or 1) > 1]
    if periodic:
        raise ValueError(
            f"units=['layers']: {periodic[0]}={getattr(config, periodic[0])} of this {model_type} says by "
            "their numbers which layers have experts, which a cut would change. Remove other units."
        )
    lengths = {extent.of for extent in stacks if _config_of(model, extent) is config}
    for key, values in lists_along(config):
        if lengths and len(values) not in lengths:
            raise ValueError(
                f"units=['layers']: the config's {key} has {len(values)} entries, the model "
                f"{' and '.join(map(str, sorted(lengths)))} layers. Mend config.json, then open the model again."
            )


def drop_layers_(model: Any, extent: Extent, kept: Sequence[int]) -> None:
    """Keep only these layers of a stack, in place; numbers in the modules and in the configs follow."""
    layers = model.get_submodule(extent.path)
    owner, _, name = extent.path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ModuleList([layers[index] for index in kept]))
    forget_([module for index, layer in enumerate(layers) if index not in kept for module in layer.modules()])
    for index, layer in enumerate(model.get_submodule(extent.path)):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    config, name = holder(model.config, extent.axis.config)
    keep_layers_(config, name, kept)
    own = next((m.config for path, m in _up(model, extent.path) if hasattr(m, "config")), config)
    if own is not config and type(own) is type(config):  # a stack's copy calls its own layers `num_hidden_layers`
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
    config = _config_of(model, extent)
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
