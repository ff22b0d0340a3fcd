"""Axes that run through the whole model: where hidden channels lie, and what their tensors make of its numbers.

Where they lie is found, not listed: the model once more on the meta device, with a smaller number in its config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .axes import Axis, Family, Part, Role
from .configs import raw
from .effects import Effect, Snapshot, changed, compared, smaller
from .instance import build, quiet
from .outside import other_matrices, rows_outside
from .sites import Extent, Site, Where, find_tensor, input_axis, module_of, tensor_of

HIDDEN = ("hidden",)  # the place of the hidden channels in a plan


@dataclass(frozen=True)
class Share:
    """What a tensor adds to the numbers of an anatomy, and the wide axes that run along it, each once a dimension."""

    along: tuple[Where, ...]
    numbers: Mapping[str, float]  # field of the anatomy -> its part
    layer: Where = ()  # (stack, layer); (): outside them
    of_layer: Mapping[str, float] = field(default_factory=dict)  # the same of fields that have an entry for each layer

    def scaled(self, factor: float) -> Share:
        numbers, of_layer = ({k: v * factor for k, v in each.items()} for each in (self.numbers, self.of_layer))
        return Share(self.along, numbers, self.layer, of_layer)


# --- where hidden channels lie ---------------------------------------------------------------------------------------


def find_hidden(model: Any, family: Family, sites: Sequence[Site]) -> tuple[list[Extent], str]:
    """The hidden channels of a model whose row has them; or why they cannot go.

    What a smaller hidden size makes smaller are they, but for what the rows of the sites say is something else: where a
    class works out the size of a head from it, the heads' own entries change too.
    """
    axis, of = family.hidden, raw(model.config, family.hidden.config) if family.hidden else None
    if axis is None or not isinstance(of, int):
        return [], ""
    found = _narrower(model, axis, of, sites)
    if isinstance(found, str):
        return [], found
    theirs = {(f"{site.path}.{part.tensor}", part.dim) for site in sites for part in site.parts}
    mine = {place: sizes for place, sizes in found.shapes.items() if place not in theirs}
    odd = next((name for (name, _), sizes in mine.items() if sizes != (of, found.new)), None)
    if odd is not None:
        return [], f"{odd} is not sized by {axis.config} alone"
    counted = {f"{site.path}.{count.attribute}" for site in sites for count in site.row.counts}
    repeated = [path for path, sizes in found.attributes.items() if sizes == (of, found.new) and path not in counted]
    parts = tuple(Part(name, dim, (axis.name,), _role(model, name, dim)) for name, dim in mine)
    also = {key: raw(model.config, key) for key in axis.also}
    here = replace(axis, also=tuple(key for key, value in also.items() if value == of))
    never = tuple(value for value in also.values() if isinstance(value, int) and value != of)  # a projection would go
    return [Extent(HIDDEN, here, of, parts=parts, attributes=tuple(repeated), never=never)], ""


def _narrower(model: Any, axis: Axis, of: int, sites: Sequence[Site]) -> Effect | str:
    """What a smaller hidden size does to this model, everything else said aloud."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("hf_prune", None)
    config.per_layer_config = None
    said = {a.config: site.sizes[a.name] for site in sites for a in site.row.axes}
    said |= {a.width_config: site.widths[a.name] for site in sites for a in site.row.axes if a.width_config}
    keys = (axis.config, *(key for key in axis.also if raw(config, key) == of))
    heads = max((site.sizes[a.name] for site in sites for a in site.row.axes if a.mixes), default=1)
    reason, base = "", Snapshot.of(model)
    for new in (*smaller(of), *range(heads * (of // heads), 0, -heads)):
        try:
            with quiet():
                narrow = build(type(model), changed(config, said | dict.fromkeys(keys, new)), "meta", model.dtype)
        except Exception as error:  # whatever a class says of a config that it does not take
            reason = reason or f"{axis.config}={new}: {error}".replace("\n", " ")[:160]
            continue
        if new < of:
            return compared(axis.config, of, new, base, Snapshot.of(narrow)) or f"{axis.config} sizes nothing"
    return reason


def _role(model: nn.Module, name: str, dim: int) -> Role:
    module, tensor = model.get_submodule(module_of(name)), tensor_of(model, name)
    if tensor.dim() < 2 or isinstance(module, nn.Embedding) or not name.endswith("weight"):
        return "carries"
    return "reads" if dim == input_axis(module) else "makes"


# --- what narrower ones cost -----------------------------------------------------------------------------------------


def shares(
    model: Any,
    extents: Sequence[Extent],
    vocabulary: Sequence[Part],
    layers: Mapping[Where, str],
    in_sites: set[str],
    tokens: int | None,
) -> tuple[Share, ...]:
    """Of every tensor that a wide axis runs along, what it adds to the numbers of the anatomy; tied ones come once.

    Args:
        layers: (stack, layer) -> path.
        in_sites: the tensors that belong to sites.
        tokens: of one image, None for text.
    """
    along: dict[int, tuple[str, list[Where]]] = {}
    for extent in extents:
        for part in extent.parts:
            name, places = along.setdefault(id(tensor_of(model, part.tensor)), (part.tensor, []))
            if name == part.tensor:
                places.append(extent.where)
    rows = rows_outside(model, [*layers.values()], tokens) if along else {}
    names: dict[int, list[str]] = {}
    for name in rows:
        names.setdefault(id(tensor_of(model, f"{name}.weight")), []).append(name)
    matrices = {f"{m}.weight" for path in layers.values() for m in other_matrices(model, path, in_sites)}
    found = []
    for key, (name, places) in along.items():
        tensor = tensor_of(model, name)
        layer = next((where for where, path in layers.items() if name.startswith(f"{path}.")), ())
        numbers = dict(_numbers(tensor, vocabulary, model))
        of_layer = {"layer_params": _params(tensor), "layer_weights": tensor.numel() * (name in matrices)}
        if layer:
            numbers["block_params"] = _params(tensor)
        for i, name_of_sum in enumerate(("outside_macs_token", "outside_macs_example")):
            numbers[name_of_sum] = tensor.numel() * sum(rows[module][i] for module in names.get(key, ()))
        found.append(Share(tuple(places), numbers, layer, of_layer if layer else {}))
    return tuple(found)


def _params(tensor: torch.Tensor) -> int:
    return tensor.numel() if isinstance(tensor, nn.Parameter) else 0


def _numbers(tensor: torch.Tensor, vocabulary: Sequence[Part], model: Any) -> Iterator[tuple[str, float]]:
    yield "total_params", _params(tensor)
    yield "total_bytes", _params(tensor) * tensor.element_size()
    here = [part for part in vocabulary if find_tensor(model, part.tensor) is tensor]
    yield "token_params", _params(tensor) / tensor.shape[here[0].dim] if here else 0
    yield "token_weights", sum(tensor.shape[1] for part in here if part.role == "makes")
