"""A family row read off a model: from what each number of its config sizes (`effects`) to sublayers and their axes.

What one tensor's rows mean can often be said in several ways (gate and up one behind the other, or in turn): they come
as candidates, and `prove` finds the one that is true.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .axes import Axis, Count, Part, Stack, Sublayer
from .effects import Effect, Snapshot

HEADS = re.compile("head")  # keys of what attention is split into; what a key sizes else is for the shapes to say
SIZE = re.compile("dim|size")
CROSS = re.compile(r"cross|encoder_?attn|encdec", re.IGNORECASE)
MOST = 8  # layouts tried of one sublayer

Entry = tuple[str, int]  # (tensor of a layer, dimension)
Places = dict[tuple[str, int], list[Entry]]  # (stack, layer) -> what is sized there
Layers = dict[int, dict[str, list[Entry]]]  # layer -> key -> what it sizes there


class Unknown(ValueError):
    """Units that lie in a way that no row can say, and why."""


@dataclass(frozen=True)
class Candidate:
    """What some keys size in layers: the stacks with those sublayers alone, in every way in which they may lie."""

    word: str  # the units: neurons, heads
    keys: tuple[str, ...]
    stacks: list[tuple[Stack, ...]]

    def alternatives(self) -> Iterator[tuple[Stack, ...]]:
        """Every way; heads that must be the same in all layers come behind those that need not."""
        yield from self.stacks
        for stacks in self.stacks if self.word == "heads" else ():
            yield tuple(replace(s, sublayers=tuple(_tied(row) for row in s.sublayers)) for s in stacks)


def _tied(row: Sublayer) -> Sublayer:
    return replace(row, axes=tuple(replace(axis, tied=True) for axis in row.axes))


@dataclass
class Reading:
    """What the effects of a config's keys say about a model."""

    model: nn.Module  # on the meta device
    snapshot: Snapshot
    effects: Sequence[Effect]
    added: Sequence[str] = ()  # keys that were said aloud
    numbers: Mapping[str, int] = field(default_factory=dict)  # all sizes in the config, by key
    prefix: str = ""  # of the paths of stacks, which are relative to the base model
    refused: dict[str, list[str]] = field(default_factory=dict)  # units -> reasons

    def refuse(self, word: str, reason: object) -> None:
        self.refused.setdefault(word, []).append(str(reason))


# --- stacks ----------------------------------------------------------------------------------------------------------


def stacks(reading: Reading) -> list[Stack]:
    """The lists of layers that a key shortens, outermost first; then those that no key does, whose layers must stay."""
    found: dict[str, str] = {}
    lists = _lists(reading)
    for effect in reading.effects:
        if effect.gone and not effect.came:
            try:
                found |= dict.fromkeys(_shortened(effect, lists, reading), effect.key)
            except Unknown as reason:
                reading.refuse("layers", reason)
    rest = [path for path in lists if not any(f"{path}.".startswith(f"{known}.") for known in found)]
    outer = [p for p in rest if not any(p != o and f"{p}.".startswith(f"{o}.") for o in rest)]
    outer = [p for p in outer if not any(known.startswith(f"{p}.") for known in found)]
    named: dict[str, Stack] = {}
    for path, key in {**found, **dict.fromkeys(outer, "")}.items():
        name = _name(path, key, reading.model)
        while name in named:
            name += "_"
        named[name] = Stack(name, path, Axis("layers", key, "any" if key else "none"), ())
    return list(named.values())


def _lists(reading: Reading) -> dict[str, int]:
    """The lists of layers of the base model, by path in it."""
    base = reading.model.get_submodule(reading.prefix.rstrip("."))
    return {path: len(m) for path, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)}


def _shortened(effect: Effect, lists: Mapping[str, int], reading: Reading) -> set[str]:
    """The lists whose last elements are all that vanishes.

    Raises:
        Unknown: something else vanishes or changes too.
    """
    removed, found = effect.old - effect.new, set()
    left = set(effect.gone)
    for path, length in lists.items():
        last = tuple(f"{reading.prefix}{path}.{index}." for index in range(max(length - removed, 0), length))
        inside = {name for name in reading.snapshot.shapes if name.startswith(last)}
        if inside and inside <= left and length > removed:
            found.add(path)
            left -= inside
    if left or effect.shapes:
        other = next(iter(left), None) or next(iter(effect.shapes))[0]
        raise Unknown(f"{effect.key} sizes {other}, which is no layer of a list")
    return found


def _name(path: str, key: str, model: Any) -> str:
    """What a plan calls a stack: the tower's name where it has a config of its own, else by its side."""
    tower = key.rpartition(".")[0].removesuffix("_config").replace(".", "_")
    side = "decoder" if "decoder" in path or ("encoder" not in path and model.can_generate()) else "encoder"
    return tower or side


# --- sublayers -------------------------------------------------------------------------------------------------------


def candidates(reading: Reading, stacks: Sequence[Stack]) -> Iterator[Candidate]:
    """All that keys size inside of layers, key by key. What cannot be said is refused in the reading."""
    local = {e.key: found for e in reading.effects if (found := _in_layers(e, reading, stacks))}
    for keys in _together(local):
        word = "heads" if any(HEADS.search(key) for key in keys) else "neurons"
        try:
            yield Candidate(word, keys, _alternatives(reading, stacks, keys, local))
        except Unknown as reason:
            reading.refuse(word, f"{' and '.join(keys)}: {reason}")


def _in_layers(effect: Effect, reading: Reading, stacks: Sequence[Stack]) -> Places:
    """What a key sizes in each layer, where it sizes nothing outside of layers; else {}."""
    found: Places = {}
    if effect.gone or effect.came:
        return {}
    for tensor, dim in effect.shapes:
        place = _place(tensor, reading, stacks)
        if place is None:
            return {}
        found.setdefault(place[:2], []).append((place[2], dim))
    return found


def _place(tensor: str, reading: Reading, stacks: Sequence[Stack]) -> tuple[str, int, str] | None:
    """The stack and the layer that a tensor is in, and its name there."""
    for stack in stacks:
        at = f"{reading.prefix}{stack.layers}."
        index, _, name = tensor.removeprefix(at).partition(".")
        if tensor.startswith(at) and index.isdigit():
            return stack.name, int(index), name
    return None


def _together(local: Mapping[str, Places]) -> list[tuple[str, ...]]:
    """Keys that size one structure: the number of query heads and that of the keys and values that they share, where
    they are in the same modules; else one alone."""
    heads = [key for key in local if HEADS.search(key) and not SIZE.search(key)]
    found: list[tuple[str, ...]] = []
    while heads:
        first, *heads = heads
        near = [key for key in heads if _modules(local[key]) & _modules(local[first])]
        heads = [key for key in heads if key not in near]
        found.append((first, *near))
    return [*found, *((key,) for key in local if not HEADS.search(key))]


def _modules(places: Places) -> set[str]:
    """The modules that hold the modules that a key sizes."""
    return {
        f"{stack}.{layer}.{tensor.rsplit('.', 2)[0]}"
        for (stack, layer), entries in places.items()
        for tensor, _ in entries
    }


def _alternatives(
    reading: Reading, stacks: Sequence[Stack], keys: Sequence[str], local: Mapping[str, Places]
) -> list[tuple[Stack, ...]]:
    """The stacks with all that these keys size, in every layout that the shapes allow.

    Raises:
        Unknown: none can be said.
    """
    rows: dict[str, list[list[Sublayer]]] = {}
    for stack in stacks:
        here = {k: {layer: e for (name, layer), e in local[k].items() if name == stack.name} for k in keys}
        by_root = _by_root(here)
        for root, layers in by_root.items():
            rows.setdefault(stack.name, []).append(_rows(Group(reading, stack, root, layers)))
    most = max(len(row) for found in rows.values() for row in found)
    return [
        tuple(
            replace(stack, sublayers=tuple(row[min(number, len(row) - 1)] for row in rows[stack.name]))
            for stack in stacks
            if stack.name in rows
        )
        for number in range(most)
    ]


def _by_root(here: Mapping[str, Mapping[int, list[Entry]]]) -> dict[str, Layers]:
    """What keys size in the layers of a stack, by sublayer: the innermost module that holds both a matrix whose inputs
    the units are and one whose outputs they are."""
    found: dict[str, Layers] = {}
    for layer in sorted({layer for layers in here.values() for layer in layers}):
        entries = {key: layers.get(layer, []) for key, layers in here.items()}
        every = [entry for each in entries.values() for entry in each]
        roots = {_root(tensor, every) for tensor, dim in every if dim == 1} or {""}
        roots = {r for r in roots if not any(o != r and _under(f"{r}.x", o) for o in roots)}
        for key, each in entries.items():
            for entry in each:
                root = next((r for r in roots if _under(entry[0], r)), "")
                found.setdefault(root, {}).setdefault(layer, {}).setdefault(key, []).append(entry)
    return found


def _root(reader: str, entries: Sequence[Entry]) -> str:
    parts = reader.split(".")[:-1]
    for end in range(len(parts) - 1, -1, -1):
        root = ".".join(parts[:end])
        if any(other != reader and _under(other, root) for other, _ in entries):
            return root
    return ""


def _under(tensor: str, root: str) -> bool:
    return not root or tensor.startswith(f"{root}.")


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
        return next(effect for effect in self.reading.effects if effect.key == key)

    def at(self, layer: int) -> str:
        return f"{self.reading.prefix}{self.stack.layers}.{layer}."

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


def _rows(group: Group) -> list[Sublayer]:
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
        optional=len(group.layers) < len(group.reading.model.get_submodule(group.at(0)[:-3])),  # type: ignore[arg-type]
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
        if path.startswith(at) and _under(path.removeprefix(at), group.root) and path not in moved
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
            if not path.startswith(first) or not _under(inside, group.root):
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
        if _under(f"{path}.x", group.root) and hasattr(module, "config") and names & _names_in(module)
    )
    return next(asking, "")


def _names_in(module: nn.Module) -> set[str]:
    """The attributes that the code of forward() names."""
    return {*inspect.unwrap(type(module).forward).__code__.co_names}
