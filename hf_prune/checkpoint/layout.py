"""What a config says about the sizes of a pruned model, and how a model is built to it.

Three forms (checkpoint contract): the stock keys alone; the stock keys with a global head size, for a head count that
the stock class would refuse; transformers' `per_layer_config`, or `hf_prune.layers` for encoder-decoder models, which
that schema cannot describe. All but the first need this loader: the stock class is built at its dense sizes (on the
meta device inside from_pretrained, so at no cost) and cut to what the config says before any weight is loaded.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..model.axes import Family
from ..model.configs import configs_of, holder, holders, holds, nested, put_in_, raw, set_
from ..model.cut import cut_
from ..model.families import family_for, registered
from ..model.sites import Site, find_sites, stacks_of

FORMAT = 2
FORMATS = (1, 2)  # that can be read
KEY = "hf_prune"  # of the entry in config.json
HOME = "_hf_prune_home"  # attribute of a model: the directory that it was loaded from
FORMS = ("stock", "uniform", "per_layer")
RESTORE = "Restore config.json, or save the model again."
BUILDING = threading.Lock()  # while a config that several threads may share is copied, or told what a class decided


def entry_of(config: Any) -> Mapping[str, Any]:
    """What a config says of the pruning; see `checked`."""
    return checked(config.__dict__.get(KEY))


def checked(entry: Any) -> Mapping[str, Any]:
    """The entry of a config.json; empty where it says nothing.

    Raises:
        ValueError: an entry that this version of hf_prune does not understand.
    """
    if not entry:
        return {}
    if not isinstance(entry, Mapping):
        raise ValueError(f"The config's {KEY!r} is {_short(entry)}; a mapping is needed. {RESTORE}")
    if entry.get("format") not in FORMATS or entry.get("shapes") not in FORMS:
        raise ValueError(
            f"This checkpoint has shapes {entry.get('shapes')!r} in format {entry.get('format')!r}; this hf_prune "
            f"knows {', '.join(FORMS)} in the formats {FORMATS}. Upgrade hf_prune, or restore config.json."
        )
    return entry


def needs_loader(config: Any) -> bool:
    """Whether the stock class would build other shapes than the config means.

    Raises:
        ValueError: see `entry_of`; stock shapes are anybody's, and open in every format.
    """
    entry = config.__dict__.get(KEY)
    return not (isinstance(entry, Mapping) and entry.get("shapes") == "stock") and bool(entry_of(config))


def size_keys(config: Any, family: Family) -> list[str]:
    """All config keys that size the units of sites."""
    axes = (axis for stack in stacks_of(config, family) for row in stack.sublayers for axis in row.axes)
    found = dict.fromkeys(key for axis in axes for key in (axis.config, *axis.also))
    return [key for key in found if holds(config, key)]


def dense_values(config: Any, family: Family) -> dict[str, Any]:
    """The size keys of the dense model: remembered from an earlier cut, else as they stand."""
    return {key: raw(config, key) for key in size_keys(config, family)} | dict(entry_of(config).get("dense") or {})


def write_(model: Any, family: Family, summary: Mapping[str, Any]) -> str:
    """Make the config say what the weights are, in the plainest form that can; returns that form's name.

    Args:
        family: the model's row.
        summary: more entries for the config's `hf_prune`.
    """
    sites = find_sites(model, family)
    dense = _decided(model, family, dense_values(model.config, family)) | _of_the_stream(sites)
    form, entry = _form(model.config, family, sites, dense)
    _write_sizes_(model, family, sites, dense, form)
    model.config.hf_prune = {"format": FORMAT, "shapes": form, "dense": dense, **entry, **summary}
    return form


def _decided(model: Any, family: Family, dense: dict[str, Any]) -> dict[str, Any]:
    """The dense sizes, also those that the class decides by itself, as no key of its config can: on the meta device."""
    axes = [axis for stack in family.stacks for row in stack.sublayers for axis in row.axes]
    unknown = {axis.config for axis in axes if axis.stock == "none" and dense.get(axis.config, 0) is None}
    if not unknown:
        return dense
    with torch.device("meta"):
        sites = find_sites(type(model)(copy.deepcopy(model.config)), family)
    return dense | {key: value for site in sites for key, value in site.values.items() if key in unknown}


def _of_the_stream(sites: list[Site]) -> dict[str, int]:
    """The heads that a class builds by itself where it makes them as wide together as the stream is, which may have
    become narrower: fewer than when dense then need no loader."""
    return {
        axis.config: site.sizes[axis.name]
        for site in sites
        for axis in site.row.axes
        if axis.stock == "none" and axis.mixes and site.columns == site.hidden
    }


def _form(config: Any, family: Family, sites: list[Site], dense: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The plainest form that can say these sizes, and what the entry needs besides."""
    if not (_is_uniform(sites) and _accepts(config, sites)):
        if tells_layers(config, family) and all(_is_uniform(here) for here in _by_layer(sites)):
            return "per_layer", {}
        return "per_layer", {"layers": {f"{s.stack}.{s.layer}.{s.kind}": s.values for s in sites}}
    cut = {axis.stock for site in sites for axis in site.row.axes if site.values[axis.config] != dense[axis.config]}
    return "uniform" if "none" in cut else "stock", {}


def _by_layer(sites: list[Site]) -> list[list[Site]]:
    """Where two sites of a layer say other numbers by one key, as shared experts may, a layer's config says but one."""
    return [[site for site in sites if site.path == path] for path in dict.fromkeys(site.path for site in sites)]


def _accepts(config: Any, sites: list[Site]) -> bool:
    """Whether the config class takes these sizes for all layers: some only take head counts that divide the width."""
    told = copy.deepcopy(config)
    told.per_layer_config = None
    for site in sites:
        for key, value in site.values.items():
            set_(told, key, value)
    try:
        for each in nested(told):
            each.validate()
    except StrictDataclassError:
        return False
    return True


def tells_layers(config: Any, family: Family) -> bool:
    """Whether transformers' own `per_layer_config` can tell layers apart: in one stack whose layers the config counts,
    sized by the config itself. What a stem has stands beside it."""
    if any(not stack.axis.config for stack in family.layered.stacks):
        return False
    return not config.is_encoder_decoder and not any("." in key for key in size_keys(config, family.layered))


def _is_uniform(sites: list[Site]) -> bool:
    seen: dict[str, int] = {}
    return all(seen.setdefault(key, value) == value for site in sites for key, value in site.values.items())


def _write_sizes_(model: Any, family: Family, sites: list[Site], dense: Mapping[str, Any], form: str) -> None:
    """Write the sizes into the model's config and all its copies, in a form."""
    values = dict(dense)
    for site in sites:
        if form != "per_layer" or site.is_stem:
            values.update(site.values)
    for site in sites:
        for axis in site.row.axes:
            unlike = site.columns != site.hidden and raw(model.config, axis.width_config or "") is None
            if axis.width_config and (unlike or site.sizes[axis.name] != dense[axis.config]):
                values[axis.width_config] = site.widths[axis.name]
    for config in configs_of(model):
        config.per_layer_config = None
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    for key, value in values.items():
        for config, name in holders(model, key):
            put_in_(config, name, value)
    _repeat_(model, family, values)
    if form == "per_layer" and tells_layers(model.config, family):
        layers: dict[int, dict[str, int]] = {}
        for site in (site for site in sites if not site.is_stem):
            layers.setdefault(site.layer, {}).update(site.values)
        for config in configs_of(model):
            config.allow_global_per_layer_attribute_access = True
            config.per_layer_config = layers


def _repeat_(model: Any, family: Family, values: Mapping[str, Any]) -> None:
    """What the whole model says besides its config: a loss over experts asks how many there are."""
    for axis in (axis for stack in family.stacks for row in stack.sublayers for axis in row.axes):
        for name in (name for name in axis.repeated if hasattr(model, name)):
            setattr(model, name, values[axis.config])


# --- loading ---------------------------------------------------------------------------------------------------------


def planned_values(config: Any, site: Site) -> Mapping[str, int]:
    """The sizes that a config gives a site, by config key.

    Raises:
        ValueError: it gives none.
    """
    layers = entry_of(config).get("layers")
    view = config.per_layer_config[site.layer] if config.is_heterogeneous else config
    values = layers.get(f"{site.stack}.{site.layer}.{site.kind}", {}) if layers else None
    found = {key: raw(view, key) if values is None else values.get(key) for key in site.values}
    for key, value in found.items():
        if value is None:
            raise ValueError(f"The config gives {site.name} no {key}. {RESTORE}")
    return found


def check_sizes(config: Any) -> None:
    """Raise ValueError unless a pruned config names dense sizes, and none of its own that is larger.

    Compared before anything is built: a size is a number in a file, and a wrong one eats memory.
    """
    entry, row = entry_of(config), registered(config.model_type)
    dense, layers = entry.get("dense"), entry.get("layers", {})
    given = {*dense} if isinstance(dense, Mapping) else set()  # of a derived row only it tells
    keys = size_keys(config, row) if row else [*given]
    needed = {*size_keys(config, row.layered)} if row else given  # early versions knew no stems
    if not isinstance(dense, Mapping) or not needed <= given <= {*keys} or not all(map(_is_size, dense.values())):
        raise ValueError(f"The config's {KEY}.dense must give the sizes {', '.join(keys)}; it is {dense!r}. {RESTORE}")
    if not isinstance(layers, Mapping) or not all(isinstance(values, Mapping) for values in layers.values()):
        raise ValueError(f"The config's {KEY}.layers must give sizes by site; it is {_short(layers)}. {RESTORE}")
    told = {"": {key: raw(config, key) for key in dense}, **layers}
    if config.is_heterogeneous:
        told |= {f"layer {layer}": values for layer, values in config._heterogeneity_spec.per_layer_overrides.items()}
    for where, values in told.items():
        for key in dense:
            value = values.get(key)
            if not _is_size(value) or (value or 0) > (dense[key] or math.inf):
                at = f" for {where}" if where else ""
                raise ValueError(f"The config says {key}={_short(value)}{at}, of {dense[key]} when dense. {RESTORE}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _is_size(value: Any) -> bool:
    """None: the class has a default."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def dense_config(config: Any) -> Any:
    """A copy that shows the dense sizes alone: what a stock class reads while it builds."""
    dense = copy.deepcopy(config)
    entry = dense.__dict__.pop(KEY)
    dense.__dict__.pop("_heterogeneity_spec", None)
    for key, value in entry["dense"].items():
        set_(dense, key, value)
    return dense


def build_(model: Any, init: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
    """Run a stock class's `init` at its dense sizes, then cut the model to what `config` says.

    The class reads a copy, so that models can be built of one config in several threads.

    Raises:
        ValueError: a config that no cut of the dense model can be meant by.
    """
    if not needs_loader(config):
        init(config, *args, **kwargs)
        return
    check_sizes(config)
    with BUILDING:
        dense = dense_config(config)
    init(dense, *args, **kwargs)
    _hand_over_(model, dense, config)
    for site in find_sites(model, family_for(config.model_type)):
        if site.values.keys() <= config.hf_prune["dense"].keys():  # early versions knew no stems, which are whole then
            _shrink_(model, site, planned_values(config, site))


def _hand_over_(model: nn.Module, dense: Any, config: Any) -> None:
    """Give the model its own config in place of the dense copy, with what the stock class decided on the way."""
    pruned = {key: raw(config, key) for key in config.hf_prune["dense"]}
    sizes = {holder(config, key)[1].partition(".")[0] for key in pruned}
    pairs = list(zip(nested(dense), nested(config), strict=True))
    owner = {id(shown): own for shown, own in pairs}
    with BUILDING:
        for shown, own in pairs:
            own.__dict__.update({k: v for k, v in vars(shown).items() if k not in sizes and id(v) not in owner})
    for module in model.modules():
        held = getattr(module, "config", None)
        if id(held) in owner:
            module.config = owner[id(held)]
        elif type(held) is type(config):  # a stack's own copy
            for key, value in pruned.items():
                set_(held, key, value)


def _shrink_(model: nn.Module, site: Site, values: Mapping[str, int]) -> None:
    """Cut a site to as many units as the config gives it: the first ones, whose weights are loaded next."""
    groups, units = (values[axis.config] for axis in (site.outer, site.inner))
    units *= groups if site.inner.each else site.multiple
    if groups > site.sizes[site.outer.name] or units % groups or units // groups > site.share:
        told = ", ".join(f"{values[axis.config]} {axis.name} of {site.sizes[axis.name]}" for axis in site.row.axes)
        raise ValueError(f"The config gives {site.name} {told} when dense, which no cut leaves. {RESTORE}")
    kept = [group * site.share + unit for group in range(groups) for unit in range(units // groups)]
    cut_(model.get_submodule(site.path), site, site.inner.name, kept)
