"""A family row read off a model: from what each number of its config sizes (`effects`) to stacks and their sublayers.

What can be said in several ways comes as candidates, of which `prove` finds the one that is true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .axes import Axis, Stack, Sublayer
from .effects import Effect
from .mixtures import alternatives, mixtures, without
from .reading import Entry, Layers, Places, Reading, Unknown, is_under
from .sublayers import HEADS, SIZE, Group, rows_of


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
    of_experts = mixtures(reading, stacks, local)
    rest = without(of_experts, local)
    for mixture in of_experts:
        try:
            keys, ways = alternatives(reading, stacks, local, mixture)
            yield Candidate("experts", keys, [*_with_others(reading, stacks, keys[1], rest, ways), *ways])
            rest.pop(keys[1], None)
        except Unknown as reason:
            reading.refuse("experts", f"{mixture.key}: {reason}")
    for keys in _together(rest):
        word = "heads" if any(HEADS.search(key) for key in keys) else "neurons"
        try:
            yield Candidate(word, keys, _alternatives(reading, stacks, keys, rest))
        except Unknown as reason:
            reading.refuse(word, f"{' and '.join(keys)}: {reason}")


def _with_others(
    reading: Reading, stacks: Sequence[Stack], key: str, rest: Mapping[str, Places], ways: Sequence[tuple[Stack, ...]]
) -> Iterator[tuple[Stack, ...]]:
    """Experts with what else the key of their width sizes: a shared expert, or dense layers."""
    with contextlib.suppress(Unknown):
        for dense in _alternatives(reading, stacks, (key,), rest) if key in rest else ():
            others = {stack.name: stack.sublayers for stack in dense}
            for way in ways:
                names = {stack.name for stack in way}
                yield (
                    *(replace(s, sublayers=(*others.get(s.name, ()), *s.sublayers)) for s in way),
                    *(stack for stack in dense if stack.name not in names),
                )


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
            rows.setdefault(stack.name, []).append(rows_of(Group(reading, stack, root, layers)))
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
        roots = {r for r in roots if not any(o != r and is_under(f"{r}.x", o) for o in roots)}
        for key, each in entries.items():
            for entry in each:
                root = next((r for r in roots if is_under(entry[0], r)), "")
                found.setdefault(root, {}).setdefault(layer, {}).setdefault(key, []).append(entry)
    return found


def _root(reader: str, entries: Sequence[Entry]) -> str:
    parts = reader.split(".")[:-1]
    for end in range(len(parts) - 1, -1, -1):
        root = ".".join(parts[:end])
        if any(other != reader and is_under(other, root) for other, _ in entries):
            return root
    return ""
