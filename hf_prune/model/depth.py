"""Layers as units: fewer of them in a live model, and in its config."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .anatomy import Anatomy, Extent
from .configs import holder

ALONG = re.compile(r"(^|_)layers?(_|$)|(^|_)blocks?_types?($|_)")  # keys of lists with an entry for each layer
NUMBERS = ("mlp_only_layers",)  # keys of lists of layers' numbers
BOUNDS = {  # keys of the number of the first layer of another sort, or (1) of the last
    "first_k_dense_replace": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 1,
}  # fmt: skip
PERIODS = ("decoder_sparse_step", "moe_layer_interval")  # keys that make every n-th layer another sort
BY_NUMBER = (  # keys by which layers are told apart
    "out_indices", "out_features", "scale_attn_by_inverse_layer_idx", "vision_feature_layer",
)  # fmt: skip


def check_droppable(model: Any, anatomy: Anatomy) -> None:
    """Raise ValueError where a list in the config does not fit the layers, or where their numbers tell them apart."""
    held = [model.config, *(_config_of(model, extent) for extent in anatomy.extents if extent.path)]
    for config in {id(config): config for config in held}.values():
        _check_config(model, anatomy, config)


def _config_of(model: Any, extent: Extent) -> Any:
    """The config that a stack's layers are told by."""
    return holder(model.config, extent.axis.config)[0]


def _check_config(model: Any, anatomy: Anatomy, config: Any) -> None:
    numbered = [key for key in BY_NUMBER if getattr(config, key, None) not in (None, False, -1, [])]
    if numbered and (numbered[0] not in BY_NUMBER[:2] or "Backbone" in type(model).__name__):
        raise ValueError(
            f"units=['layers']: {numbered[0]}={getattr(config, numbered[0])!r} of this {anatomy.model_type} reads "
            "layers by their numbers, which a cut would change. Remove other units."
        )
    periodic = [key for key in PERIODS if (getattr(config, key, None) or 1) > 1]
    if periodic:
        raise ValueError(
            f"units=['layers']: {periodic[0]}={getattr(config, periodic[0])} of this {anatomy.model_type} says by "
            "their numbers which layers have experts, which a cut would change. Remove other units."
        )
    lengths = {extent.of for extent in anatomy.extents if extent.path and _config_of(model, extent) is config}
    for key, values in lists_along(config):
        if lengths and len(values) not in lengths:
            raise ValueError(
                f"units=['layers']: the config's {key} has {len(values)} entries, the model "
                f"{' and '.join(map(str, sorted(lengths)))} layers. Mend config.json, then open the model again."
            )


def lists_along(config: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    """The config's lists with an entry for each layer."""
    for key, value in list(config.__dict__.items()):
        if isinstance(value, list | tuple) and ALONG.search(key) and key not in NUMBERS:
            yield key, value


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
    _write_(config, extent, name, kept)
    own = next((m.config for path, m in _up(model, extent.path) if hasattr(m, "config")), config)
    if own is not config:  # the copy that a stack holds calls its own layers `num_hidden_layers`
        _write_(own, extent, name, kept)
        own.num_hidden_layers = len(kept)


def _up(model: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The modules above a path, from the innermost."""
    while path:
        path = path.rpartition(".")[0]
        yield path, model.get_submodule(path)


def _write_(config: Any, extent: Extent, name: str, kept: Sequence[int]) -> None:
    for key, values in lists_along(config):
        if len(values) == extent.of:
            setattr(config, key, [values[index] for index in kept])
    for key in NUMBERS:
        if numbers := getattr(config, key, None):
            setattr(config, key, [new for new, old in enumerate(kept) if old in numbers])
    for key, last in BOUNDS.items():
        if (bound := getattr(config, key, None)) is not None:
            setattr(config, key, sum(old < bound + last for old in kept) - last)
    setattr(config, name, len(kept))
    if hasattr(config, "stage_names"):  # of a backbone, whose layers are not dropped; other classes want them in order
        config.stage_names = config.stage_names[: len(kept) + 1]
        config.set_output_features_output_indices(None, None)


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
