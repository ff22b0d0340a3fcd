"""What a config says about the sizes of a pruned model, and how a model is built to it.

Three forms (checkpoint contract): the stock keys alone; the stock keys with a global head size, for a head count that
the stock class would refuse; transformers' `per_layer_config`, or `hf_prune.layers` for encoder-decoder models, which
that schema cannot describe. All but the first need this loader: the stock class is built at its dense sizes (on the
meta device inside from_pretrained, so at no cost) and cut to what the config says before any weight is loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from .families import Attention, Family, family_for
from .sites import Site, find_sites
from .surgery import cut_

FORMAT = 1
KEY = "hf_prune"  # of the entry in config.json


def needs_loader(config: Any) -> bool:
    """Whether the stock class would build other shapes than the config means."""
    return config.__dict__.get(KEY, {}).get("shapes") in ("uniform", "per_layer")


def size_keys(family: Family) -> list[str]:
    """All config keys that size what can be pruned."""
    keys: list[str] = []
    for row in (row for stack in family.stacks for row in stack.sublayers):
        keys += [row.heads_key, row.kv_key or row.heads_key] if isinstance(row, Attention) else [row.width_key]
    return list(dict.fromkeys(keys))


def raw(config: Any, key: str) -> Any:
    """A global value, also where layers override it."""
    return config._getattr_without_heterogeneous_validation(key, None)


def site_values(site: Site) -> dict[str, int]:
    """The config values that describe a site's sizes."""
    if not isinstance(site.row, Attention):
        return {site.row.width_key: site.columns}
    values = {site.row.heads_key: site.heads}
    return values | {site.row.kv_key: site.kv_heads} if site.row.kv_key else values


def dense_values(config: Any, family: Family) -> dict[str, Any]:
    """The size keys of the dense model: remembered from an earlier cut, else as they stand."""
    return config.__dict__.get(KEY, {}).get("dense") or {key: raw(config, key) for key in size_keys(family)}


def write_(model: Any, summary: Mapping[str, Any], model_type: str | None = None) -> str:
    """Make the config say what the weights are, in the plainest form that can; returns that form's name.

    Args:
        summary: more entries for the config's `hf_prune`.
        model_type: describe the sizes for this family instead (Llama weights saved as Mistral).
    """
    family = family_for(model_type or model.config.model_type)
    sites = find_sites(model, family_for(model.config.model_type))
    dense = dense_values(model.config, family)
    form, entry = _form(model.config, family, sites, dense)
    for config in _configs(model):
        _write_config_(config, family, sites, dense, form)
    model.config.hf_prune = {"format": FORMAT, "shapes": form, "dense": dense, **entry, **summary}
    return form


def _configs(model: nn.Module) -> list[Any]:
    """The model's config and the copies that its stacks hold."""
    found = [model.config, *(m.config for m in model.modules() if hasattr(m, "config"))]
    return list({id(c): c for c in found if type(c) is type(model.config)}.values())


def _form(config: Any, family: Family, sites: list[Site], dense: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The plainest form that can say these sizes, and what the entry needs besides."""
    if not _is_uniform(sites):
        if config.is_encoder_decoder:
            return "per_layer", {"layers": {f"{s.stack}.{s.layer}.{s.kind}": site_values(s) for s in sites}}
        return "per_layer", {}
    if family.stock_heads == "any" or not _heads_cut(sites, dense):
        return "stock", {}
    if family.stock_heads == "none":
        return "uniform", {}
    divides = all(config.hidden_size % site.heads == 0 for site in sites if site.is_attention)
    return "stock" if divides else "per_layer", {}  # the config class refuses other global head counts


def _is_uniform(sites: list[Site]) -> bool:
    seen: dict[str, int] = {}
    return all(seen.setdefault(key, value) == value for site in sites for key, value in site_values(site).items())


def _write_config_(config: Any, family: Family, sites: list[Site], dense: Mapping[str, Any], form: str) -> None:
    config.per_layer_config = None
    config.__dict__.pop("allow_global_per_layer_attribute_access", None)
    values = dict(dense)
    if form != "per_layer":
        for site in sites:
            values.update(site_values(site))
    for key, value in values.items():
        setattr(config, key, value)
    if _heads_cut(sites, dense):
        setattr(config, family.head_dim_key, next(site.head_dim for site in sites if site.is_attention))
    if form == "per_layer" and not config.is_encoder_decoder:
        layers: dict[int, dict[str, int]] = {}
        for site in sites:
            layers.setdefault(site.layer, {}).update(site_values(site))
        config.allow_global_per_layer_attribute_access = True
        config.per_layer_config = layers


def _heads_cut(sites: list[Site], dense: Mapping[str, Any]) -> bool:
    return any(isinstance(s.row, Attention) and s.heads != dense[s.row.heads_key] for s in sites)


# --- loading ---------------------------------------------------------------------------------------------------------


def planned_values(config: Any, site: Site) -> Mapping[str, int]:
    """The sizes that a config gives a site, by config key."""
    layers = config.__dict__.get(KEY, {}).get("layers")
    if layers:
        return layers[f"{site.stack}.{site.layer}.{site.kind}"]
    view = config.per_layer_config[site.layer] if config.is_heterogeneous else config
    return {key: raw(view, key) for key in site_values(site)}


@contextlib.contextmanager
def _dense_sizes(config: Any) -> Iterator[None]:
    """The config as the dense model's while a stock class reads it."""
    entry = config.__dict__.pop(KEY)
    spec = config.__dict__.pop("_heterogeneity_spec", None)
    pruned = {key: raw(config, key) for key in entry["dense"]}
    try:
        for key, value in entry["dense"].items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in pruned.items():
            setattr(config, key, value)
        if spec is not None:
            config._heterogeneity_spec = spec
        config.hf_prune = entry


def build_(model: Any, init: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
    """Run a stock class's `init` at its dense sizes, then cut the model to what `config` says."""
    if not needs_loader(config):
        init(config, *args, **kwargs)
        return
    with _dense_sizes(config):
        init(config, *args, **kwargs)
    for site in find_sites(model, family_for(config.model_type)):
        _shrink_(model, site, planned_values(config, site))
    for copy in _configs(model)[1:]:
        copy.__dict__.update({key: raw(config, key) for key in config.hf_prune["dense"]})


def _shrink_(model: nn.Module, site: Site, values: Mapping[str, int]) -> None:
    layer = model.get_submodule(site.path)
    if not isinstance(site.row, Attention):
        cut_(layer, site, "neuron", range(values[site.row.width_key]))
        return
    heads = values[site.row.heads_key]
    groups = values[site.row.kv_key] if site.row.kv_key else heads
    share = site.heads // site.kv_heads
    cut_(layer, site, "head", [g * share + j for g in range(groups) for j in range(heads // groups)])
