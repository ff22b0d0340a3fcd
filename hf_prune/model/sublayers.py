"""One sublayer of a derived row: its axes, and what each tensor may hold along a dimension, in every way that fits.

Gate and up may lie one behind the other, or in turn: both come as rows, and `prove` finds the one that is true.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .axes import Axis, Count, Part, Stack, Sublayer
from .effects import Effect
from .reading import Entry, Layers, Reading, Unknown, is_under

HEADS = re.compile("head")  # keys of what attention is split into; what a key sizes else is for the shapes to say
SIZE = re.compile("dim|size")
CROSS = re.compile(r"cross|encoder_?attn|encdec", re.IGNORECASE)
MOST = 8  # layouts tried of one sublayer


@dataclass(frozen=True)
class Group:
    """One sublayer of a stack: what keys size in the layers that have it."""

    reading: Reading
    stack: Stack
    root: str  # the module of a layer that it lies in; "": the layer
    layers: Layers

    @property
    def keys(self) -> list[str]:
        return list(dict.fromkeys(key for each in self.layers.values() for key in each))

    @property
    def entries(self) -> list[Entry]:
        found = (entry for each in self.layers.values() for entries in each.values() for entry in entries)
        return list(dict.fromkeys(found))

    def effect(self, key: str) -> Effect:
        return self.reading.effect(key)

    @property
    def path(self) -> str:
        """Of the list of layers in the model."""
        return f"{self.reading.prefix}{self.stack.layers}"

    def at(self, layer: int) -> str:
        return f"{self.path}.{layer}."

    def layer_with(self, entry: Entry) -> int:
        return next(i for i, each in self.layers.items() if any(entry in found for found in each.values()))

    def counts(self, entry: Entry) -> dict[str, tuple[int, int]]:
        """Of the keys that size a dimension: entries of a unit, and entries that follow none.

        Raises:
            Unknown: the dimension does not grow evenly.
        """
        layer = self.layer_with(entry)
        found = [key for key, entries in self.layers[layer].items() if entry in entries]
        try:
            return {key: self.effect(key).entries(self.at(layer) + entry[0], entry[1]) for key in found}
        except ValueError as error:
            raise Unknown(error) from error

    def role(self, entry: Entry) -> Any:
        """What a tensor has to do with the units along one of its dimensions.

        Raises:
            Unknown: a module that no row knows.
        """
        at, (tensor, dim) = self.at(self.layer_with(entry)), entry
        owner, _, name = tensor.rpartition(".")
        module = self.reading.model.get_submodule((at + owner).rstrip("."))
        shape = self.reading.snapshot.shapes[at + tensor]
        if len(shape) == 1 or isinstance(module, nn.Embedding):
            return "carries"
        if isinstance(module, nn.Linear) and name == "weight":
            return ("makes", "reads")[dim]
        if type(module).__name__ == "Conv1D" and name == "weight":
            return ("reads", "makes")[dim]
        raise Unknown(f"{tensor} {[*shape]} of a {type(module).__name__} is among what it sizes")


def rows_of(group: Group) -> list[Sublayer]:
    """A sublayer in every layout that its shapes allow.

    Raises:
        Unknown: none can be said.
    """
    roles = {entry: group.role(entry) for entry in group.entries}
    reads = [entry for entry, role in roles.items() if role == "reads"]
    if len(reads) != 1:
        names = ", ".join(tensor for tensor, _ in reads) or "nothing"
        raise Unknown(f"what reads the units is to be one matrix; in {group.root or 'a layer'} it is {names}")
    axes, width = _axes(group, reads[0])
    choices = [_layouts(group, axes, width, entry) for entry in group.entries]
    present = [{entry for found in each.values() for entry in found} for each in group.layers.values()]
    everywhere = set.intersection(*present)
    row = Sublayer(
        _kind(group, axes),
        tuple(axes.values()),
        (),
        tuple(_counts(group, axes, width)),
        optional=len(group.layers) < len(group.reading.model.get_submodule(group.path)),  # type: ignore[arg-type]
        config_view=_reads_config(group),
    )
    return [
        replace(
            row,
            parts=tuple(
                replace(part, role=roles[entry], optional=entry not in everywhere)
                for part, entry in zip(chosen, group.entries, strict=True)
            ),
        )
        for chosen in itertools.islice(_alike(choices), MOST)
    ]


def _alike(choices: Sequence[Sequence[Part]]) -> Iterator[list[Part]]:
    """All combinations in which tensors with as many ways lie alike."""
    kinds = list(dict.fromkeys(len(choice) for choice in choices))
    for picked in itertools.product(*(range(kind) for kind in kinds)):
        at = dict(zip(kinds, picked, strict=True))
        yield [choice[at[len(choice)]] for choice in choices]


def _axes(group: Group, reader: Entry) -> tuple[dict[str, Axis], int]:
    """Axes by key, outermost first, and the entries of a unit in what reads it.

    Raises:
        Unknown: several keys, or none, size what is read; no attribute gives the width of a head.
    """
    (inner, (width, rest)), *more = group.counts(reader).items()
    groups = [key for key in group.keys if key != inner]
    if more or rest or len(groups) > 1:
        raise Unknown(f"{', '.join(group.keys)} size {reader[0]} together with something else")
    if not HEADS.search(inner):
        if width != 1:
            raise Unknown(f"{inner} sizes it in blocks of {width}")
        return {inner: Axis("neurons", inner, aligned=True)}, 1
    attribute = _width_attribute(group, inner, width)
    home = inner.rpartition(".")[0]
    said = next((k for k in group.reading.added if HEADS.search(k) and k.rpartition(".")[0] == home), "")
    alias, also = ("", ()) if groups else ("kv_groups", _twins(group, inner))
    heads = Axis("heads", inner, "any", attribute, said, alias=alias, mixes=True, also=also)
    outer = {key: Axis("kv_groups", key, "any", attribute, said) for key in groups}
    return {**outer, inner: heads}, width


def _twins(group: Group, heads: str) -> tuple[str, ...]:
    """Keys of as many heads that size nothing: of keys and values, where each head has its own."""
    home, numbers = heads.rpartition(".")[0], group.reading.numbers
    idle = numbers.keys() - {effect.key for effect in group.reading.effects if effect.shapes or effect.gone} - {heads}
    alike = (key for key in sorted(idle) if numbers[key] == numbers[heads] and key.rpartition(".")[0] == home)
    return tuple(key for key in alike if HEADS.search(key) and not SIZE.search(key))


def _width_attribute(group: Group, heads: str, width: int) -> str:
    """The module attribute that gives the entries of a head, whatever their number.

    Raises:
        Unknown: there is none.
    """
    found = [path for path, value in _still(group, heads).items() if value == width]
    if not found:
        raise Unknown(f"no attribute of {group.root or 'the layer'} gives the {width} columns of a head")
    return found[0]


def _sum_of_attributes(group: Group, heads: str, width: int) -> str:
    """One or two attributes that make up the entries of a head in a matrix where heads are wider than in what reads
    them: latent attention's keys have parts with and without rotation.

    Raises:
        Unknown: there are none.
    """
    still = _still(group, heads)
    for count in (1, 2):
        for paths in itertools.combinations(still, count):
            if sum(still[path] for path in paths) == width:
                return "+".join(paths)
    raise Unknown(f"no attributes of {group.root or 'the layer'} give the {width} entries of a head")


def _still(group: Group, heads: str) -> dict[str, int]:
    """Numbers that the modules of a sublayer keep, whatever the number of heads is; sizes first."""
    at, moved = group.at(next(iter(group.layers))), group.effect(heads).attributes
    found = {
        path.removeprefix(at): value
        for path, value in group.reading.snapshot.attributes.items()
        if path.startswith(at) and is_under(path.removeprefix(at), group.root) and path not in moved
    }
    return dict(sorted(found.items(), key=lambda item: not re.search("dim|size", item[0])))


def _layouts(group: Group, axes: Mapping[str, Axis], width: int, entry: Entry) -> list[Part]:
    """The ways in which one tensor may hold the units.

    Raises:
        Unknown: none can be said.
    """
    counts = group.counts(entry)
    times = {key: each // width for key, (each, _) in counts.items()}
    (key, (each, rest)), *more = counts.items()
    name = axes[key].name
    if not more and each == 1 < width and not rest:
        return [Part(*entry, (name,), single=True)]
    if not more and rest:
        raise Unknown(f"{rest} of the entries of {entry[0]} follow no unit")
    if not more and each % width and axes[key].mixes:
        return [Part(*entry, (name,), width=_sum_of_attributes(group, key, each))]
    if any(each % width for each, _ in counts.values()):
        raise Unknown(f"{each} entries of {entry[0]} are no whole units of {width}")
    if not more and times[key] == 1:
        return [Part(*entry, (name,))]
    if not more:
        return [Part(*entry, (name,) * times[key]), Part(*entry, (name,), times=times[key])]
    blocks = [(axes[k].name,) * times[k] for k in sorted(counts, key=lambda k: axes[k].name != "heads")]
    return [Part(*entry, tuple(itertools.chain(*order))) for order in (blocks, blocks[::-1])]


def _kind(group: Group, axes: Mapping[str, Axis]) -> str:
    """The last word of a site's key."""
    if any(axis.mixes for axis in axes.values()):
        return "cross_attention" if CROSS.search(group.root) else "attention"
    return "ffn"


def _counts(group: Group, axes: Mapping[str, Axis], width: int) -> Iterator[Count]:
    """Attributes of modules that hold a number of units, in every layer that has them."""
    first, *others = (group.at(layer) for layer in group.layers)
    for key in group.keys:
        effect = group.effect(key)
        for path, (before, after) in effect.attributes.items():
            inside = path.removeprefix(first)
            if not path.startswith(first) or not is_under(inside, group.root):
                continue
            if any(other + inside not in effect.attributes for other in others):
                continue
            if (before, after) == (effect.old, effect.new):
                yield Count(inside, axes[key].name)
            elif (before, after) == (effect.old * width, effect.new * width):
                yield Count(inside, axes[key].name, "columns")
            elif len(axes) == 2 and axes[key].name == "heads":
                yield Count(inside, "heads", "each")


def _reads_config(group: Group) -> str:
    """The module of a sublayer whose forward() asks its config for these sizes; "": none."""
    layer = group.reading.model.get_submodule(group.at(next(iter(group.layers)))[:-1])
    names = {key.rpartition(".")[2] for key in group.keys}
    asking = (
        path
        for path, module in layer.named_modules()
        if is_under(f"{path}.x", group.root) and hasattr(module, "config") and names & _names_in(module)
    )
    return next(asking, "")


def _names_in(module: nn.Module) -> set[str]:
    """The attributes that the code of forward() names."""
    return {*inspect.unwrap(type(module).forward).__code__.co_names}
