"""A model's configs: its own, those inside it, and the copies that its modules hold. Keys are dotted paths through
sub-configs, and into lists: text_config.intermediate_size, hidden_sizes.2."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

ALONG = re.compile(r"(^|_)layers?(_|$)|(^|_)blocks?_types?($|_)")  # keys of lists with an entry for each layer
NUMBERS = ("mlp_only_layers",)  # keys of lists of layers' numbers
BOUNDS = {  # keys of the number of the first layer of another sort, or (1) of the last
    "first_k_dense_replace": 0, "moe_layer_start_index": 0, "moe_layer_end_index": 1,
}  # fmt: skip


def holder(config: Any, key: str) -> tuple[Any, str]:
    """The config that holds a key, and what it calls it (an entry of a list by its number: hidden_sizes.2)."""
    *inside, name = key.split(".")
    if name.isdigit():
        name = f"{inside.pop()}.{name}"
    for each in inside:
        config = getattr(config, each)
    return config, name


def raw(config: Any, key: str) -> Any:
    """A global value, also where layers override it; None where there is none."""
    with contextlib.suppress(AttributeError):
        config, name = holder(config, key)
        name, _, index = name.partition(".")
        found = config._getattr_without_heterogeneous_validation(name, None)
        return found[int(index)] if index and found is not None else found
    return None


def holds(config: Any, key: str) -> bool:
    """Whether a config has room for a key: an entry of a list must be one of its entries."""
    *_, last = key.split(".")
    return not last.isdigit() or int(last) < len(raw(config, key.removesuffix(f".{last}")) or ())


def set_(config: Any, key: str, value: Any) -> None:
    put_in_(*holder(config, key), value)


def put_in_(config: Any, name: str, value: Any) -> None:
    """Set what a config calls so, see `holder`."""
    name, _, index = name.partition(".")
    if index:
        values = list(getattr(config, name))
        values[int(index)] = value
        value = values
    setattr(config, name, value)


def configs_of(model: nn.Module) -> list[Any]:
    """The model's config and the copies that its stacks hold."""
    found = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
    return _unlike(config for config in found if type(config) is type(model.config))


def all_configs(model: nn.Module) -> list[Any]:
    """`configs_of`, and all that lie inside them."""
    return _unlike(inside for config in configs_of(model) for inside in nested(config))


def holders(model: nn.Module, key: str) -> list[tuple[Any, str]]:
    """All configs of a model that hold a key: in each copy, and where a module has a copy of the inner one alone."""
    first, name = holder(model.config, key)
    held = [m.config for m in model.modules() if type(getattr(m, "config", None)) is type(first)]
    alike = [config for config in nested(model.config) if type(config) is type(first)]
    inner = held if len(alike) == 1 else []  # two towers of a kind tell their configs apart by identity alone
    return [(config, name) for config in _unlike([*(holder(c, key)[0] for c in configs_of(model)), *inner])]


def nested(config: Any) -> Iterator[Any]:
    """A config and all inside it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from nested(value)


def lists_along(config: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    """The config's lists with an entry for each layer."""
    for key, value in list(config.__dict__.items()):
        if isinstance(value, list | tuple) and ALONG.search(key) and key not in NUMBERS:
            yield key, value


def keep_layers_(config: Any, name: str, kept: Sequence[int]) -> None:
    """Make a config say that only these are left of the layers that a key counts, in all that tells layers apart."""
    of = getattr(config, name)
    for key, values in list(lists_along(config)):
        if len(values) == of:
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


def _unlike(configs: Any) -> list[Any]:
    return list({id(config): config for config in configs}.values())
