"""Layers of experts of a derived row: three-dimensional tensors, and the routers that send tokens to them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .axes import Axis, Count, Part, Stack, Stock, Sublayer
from .effects import Effect, paths
from .experts import is_known
from .reading import Entry, Places, Reading, Unknown, is_under

THROUGH = re.compile(r"experts_per_tok|(^|moe_|router_)top_?k(_experts)?$|moe_k$|(selected|active)_experts")
SPLIT = re.compile(r"^(n_groups?|num_expert_groups?)$")
STOCK: tuple[Stock, ...] = ("any", "none")  # widths that the config can say


@dataclass(frozen=True)
class Mixture:
    """What a key counts in the layers that have it, with the module that holds the experts in each."""

    key: str
    homes: Mapping[tuple[str, int], str]

    def holds(self, place: tuple[str, int], tensor: str) -> bool:
        return place in self.homes and is_under(tensor, self.homes[place])


def mixtures(reading: Reading, stacks: Sequence[Stack], local: Mapping[str, Places]) -> list[Mixture]:
    """The keys that count experts."""
    found = []
    for key, places in local.items():
        homes = {place: home for place, entries in places.items() if (home := _home(reading, stacks, place, entries))}
        if homes:
            found.append(Mixture(key, homes))
    return found


def without(found: Sequence[Mixture], local: Mapping[str, Places]) -> dict[str, Places]:
    """What keys size besides experts."""
    counting = {mixture.key for mixture in found}
    rest = {
        key: {
            place: [entry for entry in entries if not any(mixture.holds(place, entry[0]) for mixture in found)]
            for place, entries in places.items()
        }
        for key, places in local.items()
        if key not in counting
    }
    kept = {key: {place: left for place, left in places.items() if left} for key, places in rest.items()}
    return {key: places for key, places in kept.items() if places}


def alternatives(
    reading: Reading, stacks: Sequence[Stack], local: Mapping[str, Places], mixture: Mixture
) -> tuple[tuple[str, ...], list[tuple[Stack, ...]]]:
    """The key of a mixture and that of its width; and the stacks with these experts alone, in every way in which they
    may lie, last those whose width the config cannot say.

    Raises:
        Unknown: none can be said.
    """
    first, home = next(iter(mixture.homes.items()))
    at = _at(reading, stacks, first)
    module = reading.model.get_submodule(at + home)
    if not is_known(module):
        raise Unknown(f"{type(module).__name__} is not called as transformers calls its experts")
    width = _width_key(local, mixture.key, first, home)
    rows = [
        _row(reading, local, (mixture.key, width), first, at, home, together, stock)
        for stock in STOCK
        for together in (False, True)
    ]
    return (mixture.key, width), [tuple(_placed(reading, stacks, mixture, row)) for row in rows]


def _placed(reading: Reading, stacks: Sequence[Stack], mixture: Mixture, row: Sublayer) -> Iterator[Stack]:
    for stack in stacks:
        layers: Any = reading.model.get_submodule(f"{reading.prefix}{stack.layers}")
        have = sum(name == stack.name for name, _ in mixture.homes)
        if have:
            yield replace(stack, sublayers=(replace(row, optional=have < len(layers)),))


def _home(reading: Reading, stacks: Sequence[Stack], place: tuple[str, int], entries: Sequence[Entry]) -> str:
    """The module of a layer that holds the experts that a key counts there; "" where it counts none."""
    for tensor, dim in entries:
        home, at = tensor.rpartition(".")[0], _at(reading, stacks, place)
        if dim == 0 and len(reading.snapshot.shapes[at + tensor]) == 3:
            module = reading.model.get_submodule((at + home).rstrip("."))
            if not isinstance(module, nn.Conv1d):
                return home
    return ""


def _at(reading: Reading, stacks: Sequence[Stack], place: tuple[str, int]) -> str:
    path = next(stack.layers for stack in stacks if stack.name == place[0])
    return f"{reading.prefix}{path}.{place[1]}."


def _width_key(local: Mapping[str, Places], key: str, place: tuple[str, int], home: str) -> str:
    """The key of how many neurons each expert has.

    Raises:
        Unknown: there is none, or several.
    """
    down = f"{home}.down_proj"
    found = [
        other
        for other, places in local.items()
        if other != key and any(tensor == down and dim > 0 for tensor, dim in places.get(place, ()))
    ]
    if len(found) != 1:
        raise Unknown(f"the width of {down} follows {' and '.join(found) or 'no key of its own'}")
    return found[0]


def _row(
    reading: Reading,
    local: Mapping[str, Places],
    keys: tuple[str, str],
    place: tuple[str, int],
    at: str,
    home: str,
    together: bool,
    stock: Stock,
) -> Sublayer:
    """keys: of how many experts there are, and of their width; `together`: gate and up of a neuron lie side by side."""
    key, width = keys
    counted, wide = reading.effect(key), reading.effect(width)
    inside = [entry for entry in local[width][place] if is_under(entry[0], home)]
    routed = _key_like(reading, key, THROUGH)
    if not routed:
        raise Unknown("no key says how many experts a token goes through")
    axes = (
        Axis("experts", key, routed=routed, split=_key_like(reading, key, SPLIT), repeated=_repeated(counted)),
        Axis("neurons", width, stock, aligned=True, each=True, step=8),
    )
    parts = [
        *(_of_experts(entry, home) for entry in local[key][place]),
        *(_of_neurons(entry, wide, at, home, together) for entry in inside),
    ]
    everywhere = set.intersection(*({*entries} for entries in local[key].values()))
    parts = [replace(part, optional=not part.within and (part.tensor, part.dim) not in everywhere) for part in parts]
    counts = (*_counts(counted, at, "experts", "units"), *_counts(wide, at, "neurons", "each", home))
    return Sublayer("experts", axes, tuple(parts), counts)


def _key_like(reading: Reading, key: str, pattern: re.Pattern[str]) -> str:
    """The whole number beside a key whose name is like this; "" where there is none."""
    beside = key.rpartition(".")[0]
    for path, config in paths(reading.model.config):
        if path.rstrip(".") == beside:
            names = (n for n, value in vars(config).items() if type(value) is int and value > 0 and pattern.search(n))
            return next((f"{path}{name}" for name in names), "")
    return ""


def _repeated(effect: Effect) -> tuple[str, ...]:
    """What the whole model says of a key besides its config."""
    same = (effect.old, effect.new)
    return tuple(path for path, values in effect.attributes.items() if "." not in path and values == same)


def _of_experts(entry: Entry, home: str) -> Part:
    """What of a tensor goes with an expert."""
    tensor, dim = entry
    if not is_under(tensor, home):
        return Part(tensor, dim, ("experts",), "routes")
    makes = tensor.removeprefix(f"{home}.") in ("gate_up_proj", "up_proj")
    return Part(tensor, dim, ("experts",), "makes" if makes else "carries")


def _of_neurons(entry: Entry, effect: Effect, at: str, home: str, together: bool) -> Part:
    """What of a tensor goes with a neuron of each expert.

    Raises:
        Unknown: entries that follow no neuron.
    """
    tensor, dim = entry
    try:
        times, rest = effect.entries(at + tensor, dim)
    except ValueError as error:
        raise Unknown(error) from error
    if rest:
        raise Unknown(f"{rest} of the entries of {tensor} follow no neuron")
    name = tensor.removeprefix(f"{home}.")
    role: Any = {"down_proj": "reads", "gate_up_proj": "makes", "up_proj": "makes"}.get(name, "carries")
    axes, wide = (("neurons",), times) if together else (("neurons",) * times, 1)
    return Part(tensor, dim, axes, role, wide, within="experts")


def _counts(effect: Effect, at: str, axis: str, of: Any, root: str = "") -> Iterator[Count]:
    """Attributes of a layer's modules that hold the number."""
    for path, values in effect.attributes.items():
        inside = path.removeprefix(at)
        if path.startswith(at) and is_under(inside, root) and values == (effect.old, effect.new):
            yield Count(inside, axis, of)
