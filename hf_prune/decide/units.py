"""Which units may go: the axes of a model that a configuration names, and the counts that each may take."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PruningConfig
from ..model.anatomy import Anatomy
from ..model.axes import Axis
from ..model.sites import Site


def choose_units(anatomy: Anatomy, config: PruningConfig) -> list[str]:
    """The units of a configuration, defaults filled in.

    By default neurons, and attention in the largest units that leave a choice: KV groups where query heads share
    several, the heads themselves where each has its own or all share one. Experts go whole where weights count, and get
    narrower where multiply-adds or time do, as a token goes through the same number of them.

    Raises:
        ValueError: units that the stock class cannot express were asked for with stock shapes; units or shapes that
            this model does not have.
    """
    _check_family(anatomy, config)
    axes = {axis for site in anatomy.sites for axis in site.row.axes}
    mute = {axis for axis in axes if axis.stock == "none"}
    said = {word for axis in axes - mute for word in (axis.name, axis.alias)}
    silent = {word for axis in mute for word in (axis.name, axis.alias)} - said if config.shapes == "stock" else set()
    if config.units is None:
        grouped = {site.inner.name for site in anatomy.sites if site.share > 1 and site.sizes[site.outer.name] > 1}
        whole = config.metric in ("params", "bytes")
        first = [
            site.outer if (whole if site.routed else site.inner.name in grouped) else site.inner
            for site in anatomy.sites
        ]
        first.sort(key=lambda axis: not axis.aligned)
        return list(dict.fromkeys(axis.name for axis in first if axis.name not in silent))
    if silent.intersection(config.units):
        allowed = dict.fromkeys(a.name for s in anatomy.sites for a in s.row.axes if a.name not in silent)
        raise ValueError(
            f"units={config.units} with shapes='stock': a stock {anatomy.model_type} config cannot say another number "
            f"of {', '.join(sorted({axis.name for axis in mute} & silent))}. Allowed in stock shapes: "
            f"{', '.join((*allowed, 'layers', 'tokens'))}. Use shapes='uniform' or 'per_layer' to remove heads."
        )
    return list(config.units)


def _check_family(anatomy: Anatomy, config: PruningConfig) -> None:
    family, refused = anatomy.family, dict(anatomy.family.refused)
    if config.shapes not in family.shapes:
        raise ValueError(
            f"shapes={config.shapes!r}: the row of this {anatomy.model_type} was derived from its config, and says "
            f"{', '.join(family.shapes)} shapes only. Others need a hand-written row (see register_family)."
        )
    here = {word for site in anatomy.sites for axis in site.row.axes for word in (axis.name, axis.alias)}
    refused |= {"kv_groups": refused["heads"]} if "heads" in refused else {}
    missing = [unit for unit in config.units or () if unit not in here | {"layers", "tokens"}]
    if missing:
        why = refused.get(missing[0], "its row has none")
        raise ValueError(
            f"units={config.units}: no {missing[0]} of this {anatomy.model_type} can go: {why}. Here are "
            f"{', '.join((*dict.fromkeys(axis.name for s in anatomy.sites for axis in s.row.axes), 'layers, tokens'))}."
        )


def asked(axis: Axis, units: Sequence[str]) -> bool:
    return axis.name in units or axis.alias in units


def unit_of(site: Site, units: Sequence[str]) -> str:
    """The axis by whose units a site is scored and planned."""
    by_outer = asked(site.outer, units) and not asked(site.inner, units)
    return site.outer.name if by_outer else site.inner.name


def default_align(anatomy: Anatomy, device: str) -> int:
    """32 on CPU, 64 on GPU, halved while the narrowest of what is aligned would offer fewer than 16 widths."""
    align = 64 if device == "cuda" else 32
    narrowest = min((site.sizes[site.inner.name] for site in anatomy.sites if site.inner.aligned), default=align)
    while align > 1 and narrowest // align < 16:
        align //= 2
    return align
