"""What each number of a config sizes: the model on the meta device, and again with that number smaller.

What differs between the two (shapes, tensors that vanish, counts that modules keep as attributes) says all that the
config can say about the model's structure, and where it lies. No weight is allocated.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from .configs import holder, keep_layers_, nested, raw, set_

Build = Callable[[Any], nn.Module]  # a config -> the model, on the meta device
NO_SIZE = re.compile(
    r"(^|_)(id|ids|index|idx|seed|version|num_labels|size_divisor|chunk_size\w*)$|dropout|theta|eps|std$"
)
PROBED = 8  # value given to a key that is not there


@dataclass(frozen=True)
class Effect:
    """What a smaller value of a key does."""

    key: str
    old: int
    new: int
    shapes: Mapping[tuple[str, int], tuple[int, int]]  # (tensor, dimension) -> entries before and after
    gone: frozenset[str] = frozenset()  # tensors
    came: frozenset[str] = frozenset()
    attributes: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # of modules, by path

    def entries(self, tensor: str, dim: int) -> tuple[int, int]:
        """Entries of a unit along a dimension, and those that follow no unit.

        Raises:
            ValueError: the dimension does not grow evenly with the key.
        """
        before, after = self.shapes[tensor, dim]
        each, rest = divmod(before - after, self.old - self.new)
        if rest or each < 1 or before < each * self.old:
            raise ValueError(f"{tensor} goes from {before} to {after} entries where {self.key} goes to {self.new}")
        return each, before - each * self.old


@dataclass(frozen=True)
class Snapshot:
    """Shapes of all tensors that are saved, by name, and numbers that modules keep."""

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls({name: tuple(t.shape) for name, t in model.state_dict().items()}, dict(_numbers(model)))


def _numbers(model: nn.Module) -> Iterator[tuple[str, int]]:
    for path, module in model.named_modules():
        if not type(module).__module__.startswith("torch."):
            for name, value in vars(module).items():
                if type(value) is int and not name.startswith("_"):
                    yield f"{path}.{name}".lstrip("."), value


def effects(build: Build, config: Any) -> Iterator[Effect | str]:
    """Of every key that sizes something what a smaller value does, or why no smaller value builds."""
    base = Snapshot.of(build(config))
    for key, value in sizes(config):
        found = effect(build, config, base, key, smaller(value))
        if found is not None:
            yield found


def effect(build: Build, config: Any, base: Snapshot, key: str, values: Sequence[int]) -> Effect | str | None:
    """What the first value that builds does to the model. None: nothing. A text: none builds, and why."""
    reason, old = "", raw(config, key)
    ways = [partial(changed, config, {key: new}) for new in values] + [
        partial(shortened, config, key, n) for n in values
    ]
    for new, way in zip((*values, *values), ways, strict=True):
        try:
            found = Snapshot.of(build(way()))
        except Exception as error:  # whatever a class says of a config that it does not take
            reason = reason or f"{key}={new}: {type(error).__name__}: {error}".replace("\n", " ")[:160]
            continue
        return compared(key, old if isinstance(old, int) else 0, new, base, found)
    return reason or None


def compared(key: str, old: int, new: int, base: Snapshot, other: Snapshot) -> Effect | None:
    """What differs between a model and the one with another value of a key; None: nothing."""
    both = base.shapes.keys() & other.shapes.keys()
    shapes = {
        (name, dim): (before, after)
        for name in sorted(both)
        for dim, (before, after) in enumerate(zip(base.shapes[name], other.shapes[name], strict=False))
        if before != after
    }
    numbers = {
        path: (value, other.attributes[path])
        for path, value in base.attributes.items()
        if other.attributes.get(path, value) != value
    }
    gone, came = base.shapes.keys() - both, other.shapes.keys() - both
    found = Effect(key, old, new, shapes, frozenset(gone), frozenset(came), numbers)
    return found if shapes or gone or came or numbers else None


def smaller(value: int) -> list[int]:
    """Values to try, first those that leave most divisors."""
    tried = (value - max(1, value // 4), value * 2 // 3, value // 2, value - 1)
    return [new for new in dict.fromkeys(tried) if 0 < new < value]


def sizes(config: Any) -> Iterator[tuple[str, int]]:
    """All numbers of a config that may size something, by dotted key."""
    for path, inside in paths(config):
        for name, value in vars(inside).items():
            if type(value) is int and value > 1 and not name.startswith("_") and not NO_SIZE.search(name):
                yield f"{path}{name}", value


def paths(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and all inside it, each with what stands before its keys."""
    yield path, config
    for name, value in list(vars(config).items()):
        if any(value is inside for inside in nested(config)):
            yield from paths(value, f"{path}{name}.")


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A copy with other values, built anew so that the class checks them."""
    found = copy.deepcopy(config)
    for key, value in values.items():
        set_(found, key, value)
    return type(config).from_dict(found.to_dict())


def shortened(config: Any, key: str, new: int) -> Any:
    """`changed`, with the lists beside the key that have as many entries cut to the first ones."""
    found = copy.deepcopy(config)
    inside, name = holder(found, key)
    keep_layers_(inside, name, range(new))
    return type(config).from_dict(found.to_dict())


# --- keys that a class reads though its config does not have them -----------------------------------------------------


def explicit(build: Build, config: Any) -> tuple[Any, tuple[str, ...]]:
    """The config with every silent size said aloud (head_dim, which most classes work out where it is not there), and
    the keys that were added: what then changes with another key is that key's alone."""
    base, added = Snapshot.of(build(config)), []
    for key in silent_keys(build, config):
        found = effect(build, config, base, key, [PROBED])
        if isinstance(found, Effect) and found.shapes and not (found.gone or found.came):
            for value in sorted({b * PROBED // a for b, a in found.shapes.values() if b * PROBED % a == 0}):
                with contextlib.suppress(Exception):
                    said = changed(config, {key: value})
                    if Snapshot.of(build(said)).shapes == base.shapes:
                        config = said
                        added.append(key)
                        break
    return config, tuple(added)


def silent_keys(build: Build, config: Any) -> list[str]:
    """Keys that are None, or that the class asks its config for in vain."""
    from transformers import PreTrainedConfig

    asked: list[tuple[int, str]] = []

    def ask(self: Any, name: str) -> Any:
        asked.append((id(type(self)), name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    PreTrainedConfig.__getattr__ = ask  # type: ignore[attr-defined]
    try:
        build(config)
    finally:
        del PreTrainedConfig.__getattr__  # type: ignore[attr-defined]
    wanted = dict.fromkeys((kind, name) for kind, name in asked if not name.startswith("_"))
    found = [
        f"{path}{name}"
        for path, inside in paths(config)
        for name in [
            *(n for k, n in wanted if k == id(type(inside))),
            *(n for n, v in vars(inside).items() if v is None),
        ]
        if re.search(r"head|dim|size|width|inner|n_|num", name) and not NO_SIZE.search(name)
    ]
    return list(dict.fromkeys(found))
