"""Cut a model to the units that a plan keeps: one loop over the tensors that an axis runs along.

Shapes: S kept units, w entries of a unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .axes import Part
from .sites import Counts, Site, module_of, tensor_of

SIZES = {  # attributes of modules that repeat a dimension of their weight
    "Linear": {"out_features": 0, "in_features": 1},
    "Conv1D": {"nx": 0, "nf": 1},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "Conv1d": {"out_channels": 0, "in_channels": 1},
    "Conv2d": {"out_channels": 0, "in_channels": 1},
    "BatchNorm1d": {"num_features": 0},
    "BatchNorm2d": {"num_features": 0},
    "GroupNorm": {"num_channels": 0},
}
GROUPS = {"groups": "out_channels", "num_groups": "num_channels"}  # go whole; of a depthwise convolution, and of many
# norms, one each is a channel


def cut_(layer: nn.Module, site: Site, axis: str, kept: Sequence[int]) -> None:
    """Remove all but the `kept` units of one axis of a site from its layer, in place."""
    left = site.expand(axis, kept)
    for part in sorted(site.parts, key=lambda part: bool(part.within)):  # first what holds others
        if any(axis in left for axis in part.axes):
            slice_(layer, part.tensor, index_of(part, left, site.sizes, site.widths), part.dim)
    for count in site.row.counts:
        _set_count_(layer, count.attribute, len(left[count.axis]), site, count.of, left)
    if site.row.config_view:
        module: Any = layer.get_submodule(site.row.config_view)
        sizes = {axis.config.rpartition(".")[2]: len(left[axis.name]) for axis in site.row.axes}
        module.config = LayerConfig(module.config, sizes)


def _set_count_(
    layer: nn.Module, path: str, units: int, site: Site, of: str, left: Mapping[str, Sequence[int]]
) -> None:
    owner, _, name = path.rpartition(".")
    groups = max(len(left[site.outer.name]), 1)
    value = {"units": units, "columns": units * site.widths[site.inner.name], "each": units // groups}[of]
    setattr(layer.get_submodule(owner), name, value)


def index_of(part: Part, kept: Mapping[str, Sequence[int]], sizes: Counts, widths: Counts) -> torch.Tensor:
    """The entries along a part's dimension that remain when these units of its axes do, [S]; of a part within another
    axis those of each of its units that remain, [G, S]."""
    start, found = 0, []
    for axis in part.axes:
        width, along = part.entries(axis, widths), part.along(axis, sizes)
        units = torch.tensor(list(kept[axis] if axis in kept else range(sizes[axis])), dtype=torch.long)
        if part.within:
            units = units.view(len(kept[part.within]), -1) % along
        found.append(start + columns_of(units, width))
        start += along * width
    return torch.cat(found, -1)


def columns_of(units: Any, width: int) -> torch.Tensor:
    """Indices [..., S*w] of consecutive blocks of `width`; units: [..., S], a sequence or a tensor."""
    numbers = torch.as_tensor(units if isinstance(units, torch.Tensor) else list(units), dtype=torch.long)
    return (numbers[..., None] * width + torch.arange(width)).flatten(-2)


def kept_columns(site: Site, axis: str, kept: Sequence[int]) -> torch.Tensor:
    """Input columns [S*w] of the consumer that remain when these units of an axis do."""
    return columns_of(site.expand(axis, kept)[site.inner.name], site.widths[site.inner.name])


def cut_arguments(arguments: Mapping[str, Any], site: Site, axis: str, kept: Sequence[int]) -> dict[str, Any]:
    """What a layer is called with, for the layer that is cut so; nothing is changed in place."""
    left, given = site.expand(axis, kept), dict(arguments)
    for argument in site.row.arguments:
        value = given.get(argument.name)
        if isinstance(value, torch.Tensor):
            index = torch.tensor(left[argument.axis], device=value.device)
            given[argument.name] = value.index_select(argument.dim, index)
    return given


@torch.no_grad()
def slice_(root: nn.Module, path: str, index: torch.Tensor, dim: int) -> None:
    """Keep `index` of a parameter or buffer along a dimension, in place; its module then says the new size. index: [S],
    or [G, S] where each of the G entries of dimension 0 keeps its own."""
    module: Any = root.get_submodule(module_of(path))
    old = tensor_of(root, path)
    put_(module, path.rpartition(".")[2], taken(old, index.to(old.device), dim))
    say_sizes_(module)


def say_sizes_(module: Any) -> None:
    """Make the attributes of a module say the sizes of its weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return
    for name, of in GROUPS.items():
        if (groups := getattr(module, name, 1)) > 1:
            setattr(module, name, groups * weight.shape[0] // getattr(module, of))
    known = (SIZES[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in SIZES)
    for name, axis in next(known, {}).items():
        setattr(module, name, weight.shape[axis] * (module.groups if name == "in_channels" else 1))
    if hasattr(module, "normalized_shape"):
        module.normalized_shape = tuple(weight.shape)


def taken(tensor: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    """What `slice_` keeps of a tensor."""
    if index.dim() == 1:
        return tensor.index_select(dim, index)
    shape = [*tensor.shape[:dim], index.shape[1], *tensor.shape[dim + 1 :]]
    return tensor.gather(dim, aligned(index, tensor.dim(), dim).expand(shape))


def aligned(values: torch.Tensor, dims: int, dim: int) -> torch.Tensor:
    """Values along a dimension [n], or along dimension 0 and another one [G, n], of a tensor of `dims` dimensions."""
    shape = [1] * dims
    shape[dim] = values.shape[-1]
    if values.dim() == 2:
        shape[0] = values.shape[0]
    return values.view(shape)


@torch.no_grad()
def put_(module: Any, name: str, value: torch.Tensor) -> None:
    """A new tensor in place of an old one, which stays as it is for whoever undoes the cut (see `undo`)."""
    old = getattr(module, name)
    value = value.to(old.dtype).contiguous()
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)


class LayerConfig:
    """A config seen from one layer: everything is read from the model's config, live, but for a few values."""

    def __init__(self, config: Any, values: dict[str, Any]) -> None:
        inner = config if not isinstance(config, LayerConfig) else config._config
        self.__dict__.update(values, _config=inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)
