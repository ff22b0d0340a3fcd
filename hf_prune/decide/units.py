"""Which units may go: the axes of a model that a configuration names, and the counts that each may take."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import PruningConfig
from ..model.anatomy import Anatomy
from ..model.axes import Axis
from ..model.families import FAMILIES
from ..model.sites import Counts, Site, Where
from ..model.wide import HIDDEN

WIDTHS = 16  # of a stream to choose from, where they need not be so round


def choose_units(anatomy: Anatomy, config: PruningConfig) -> list[str]:
    """The units of a configuration, defaults filled in.

    By default neurons, and attention in the largest units that leave a choice: KV groups where query heads share
    several, the heads themselves where each has its own or all share one. Experts go whole where weights count, and get
    narrower where multiply-adds or time do, as a token goes through the same number of them. What lies in a stem stays.

    Raises:
        ValueError: units that the stock class cannot express were asked for with stock shapes; units or shapes that
            this model does not have; units of a stem, in a cost that leaves it out.
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
            if not site.is_stem
        ]
        first.sort(key=lambda axis: not axis.aligned)
        return list(dict.fromkeys(axis.name for axis in first if axis.name not in silent))
    if silent.intersection(config.units) and "hidden" not in config.units:  # with which heads go
        allowed = dict.fromkeys(a.name for s in anatomy.sites for a in s.row.axes if a.name not in silent)
        raise ValueError(
            f"units={config.units} with shapes='stock': a stock {anatomy.model_type} config cannot say another number "
            f"of {', '.join(sorted({axis.name for axis in mute} & silent))}. Allowed in stock shapes: "
            f"{', '.join((*allowed, 'layers', 'tokens'))}. Use shapes='uniform' or 'per_layer' to remove them"
            f"{', or add hidden, with which they go.' if anatomy.family.hidden else '.'}"
        )
    if config.scope == "blocks" and (units := sorted(_of_stem(anatomy).intersection(config.units))):
        raise ValueError(
            f"units={config.units} with scope='blocks', the default of metric='params': {', '.join(units)} of this "
            f"{anatomy.model_type} lie in front of its blocks, where that cost does not look. Use scope='model'."
        )
    return list(config.units)


def considered(anatomy: Anatomy, units: Sequence[str]) -> Anatomy:
    """The anatomy that is scored and planned: without the stem, where no units of it are asked for."""
    return anatomy if _of_stem(anatomy).intersection(units) else anatomy.without_stem()


def _of_stem(anatomy: Anatomy) -> set[str]:
    return {axis.name for site in anatomy.sites if site.is_stem for axis in site.row.axes}


def _check_family(anatomy: Anatomy, config: PruningConfig) -> None:
    family, refused = anatomy.family, dict(anatomy.family.refused)
    if config.shapes not in family.shapes:
        raise ValueError(
            f"shapes={config.shapes!r}: the row of this {anatomy.model_type} was derived from its config, and says "
            f"{', '.join(family.shapes)} shapes only. Others need a hand-written row (see register_family)."
        )
    if "hidden" in (config.units or ()) and not any(extent.where == HIDDEN for extent in anatomy.extents):
        why = refused.get("hidden", "its row does not say that it can")
        known = ", ".join(sorted(name for name, row in FAMILIES.items() if row.hidden))
        raise ValueError(
            f"units={config.units}: the stream of this {anatomy.model_type} cannot become narrower: {why}. That of "
            f"{known} can. Remove other units: neurons, layers."
        )
    here = {word for site in anatomy.sites for axis in site.row.axes for word in (axis.name, axis.alias)}
    refused |= {"kv_groups": refused["heads"]} if "heads" in refused else {}
    missing = [unit for unit in config.units or () if unit not in here | {"layers", "tokens", "hidden"}]
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


def widths(anatomy: Anatomy, units: Sequence[str], align: int | None) -> list[int]:
    """The numbers of hidden channels that a stock class can say beside some number of its heads, widest first.

    They are multiples of `align`; by default of 32, halved while that leaves fewer than `WIDTHS`.
    """
    extent = anatomy.extent(*HIDDEN)
    said = [w for w in range(1, extent.of) if w not in extent.never and _beside(anatomy, units, w)]
    step = align or 32
    while align is None and step > 1 and sum(w % step == 0 for w in said) < WIDTHS:
        step //= 2
    return [extent.of, *(w for w in reversed(said) if w % step == 0)]


def follow_the_stream(anatomy: Anatomy, units: Sequence[str]) -> set[Where]:
    """The sites whose heads a stock class makes as wide together as the stream, where that may become narrower."""
    return {s.key for s in anatomy.sites if "hidden" in units and s.inner.mixes and s.inner.stock == "none"}


def _beside(anatomy: Anatomy, units: Sequence[str], width: int) -> bool:
    """Whether every site has a number of heads for a stream of this width."""
    free = [
        s for s in anatomy.sites if s.inner.stock == "divisors" and (asked(s.inner, units) or asked(s.outer, units))
    ]
    following = [site for site in anatomy.sites if site.inner.mixes and site not in free]
    return all(any(site.fits(counts, width) for counts in _heads(site)) for site in following)


def _heads(site: Site) -> list[Counts]:
    """The numbers of heads that a stream may leave of a site: all, or those that must follow it."""
    least = 1 if site.inner.stock == "none" else site.sizes[site.outer.name]
    return [site.counts(groups, site.share) for groups in range(least, site.sizes[site.outer.name] + 1)]


def default_align(anatomy: Anatomy, device: str) -> int:
    """32 on CPU, 64 on GPU, halved while the narrowest of what is aligned would offer fewer than 16 widths."""
    align = 64 if device == "cuda" else 32
    narrowest = min((site.sizes[site.inner.name] for site in anatomy.sites if site.inner.aligned), default=align)
    while align > 1 and narrowest // align < 16:
        align //= 2
    return align
