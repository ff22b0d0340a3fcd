"""The words that rows are written in: axes, and the sublayers that most families have under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..axes import Argument, Axis, Count, Family, NormPlace, Part, Parts, Stack, Stock, Sublayer, made_by, read_by

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV_OUT = ("q_proj", "k_proj", "v_proj", "out_proj")


def heads(config: str, width: str, stock: Stock = "none", width_config: str = "head_dim", tied: bool = False) -> Axis:
    """Query heads that each have their own keys and values."""
    return Axis("heads", config, stock, width, width_config, alias="kv_groups", tied=tied, mixes=True)


def grouped_heads(config: str, kv_config: str, width: str, stock: Stock) -> tuple[Axis, Axis]:
    """KV heads with the query heads that share them, and those query heads."""
    inner = replace(heads(config, width, stock), alias="")
    return Axis("kv_groups", kv_config, stock, width, "head_dim"), inner


def narrowing(row: Family, config: str = "hidden_size", *also: str) -> Family:
    """The row whose stream may be narrower. `also`: keys of other widths, where they are the same."""
    return replace(row, hidden=Axis("hidden", config, aligned=True, also=also))


def neurons(config: str, stock: Stock = "any") -> Axis:
    return Axis("neurons", config, stock, aligned=True)


def layers(config: str, fixed: tuple[int, ...] = ()) -> Axis:
    return Axis("layers", config, fixed=fixed)


def attention(
    module: str,
    axes: Axis | tuple[Axis, Axis],
    names: Sequence[str] = QKVO,
    counts: tuple[Count, ...] = (),
    *,
    kind: str = "attention",
    norm: str = "",
    norm_place: NormPlace = "",
    source: str = "",
    times: int = 1,
    more: Parts = (),
    arguments: tuple[Argument, ...] = (),
    optional: bool = False,
    config_view: str = "",
) -> Sublayer:
    """Attention with a matrix each for queries, keys, values and the output.

    `times`: entries of a head that the queries' matrix makes, in widths (2 with a gate beside each query).
    """
    both = axes if isinstance(axes, tuple) else (axes,)
    query, key, value, output = (f"{module}.{name}" for name in names)
    shared = both[0].name
    return Sublayer(
        kind,
        both,
        (
            *made_by(query, "heads", times=times),
            *made_by(key, shared, source=source),
            *made_by(value, shared, source=source),
            *more,
            *read_by(output, "heads"),
        ),
        counts,
        arguments,
        optional,
        config_view,
        norm,
        norm_place,
    )


def fused_attention(
    axes: Axis | tuple[Axis, Axis],
    fused: str,
    output: str,
    counts: tuple[Count, ...],
    *,
    interleaved: bool = False,
    conv1d: bool = False,
    config_view: str = "",
    more: Parts = (),
    norm: str = "",
    norm_place: NormPlace = "",
) -> Sublayer:
    """Attention with one matrix for queries, keys and values: [q | k | v], or q, k and v of each head together."""
    both = axes if isinstance(axes, tuple) else (axes,)
    along = ("heads",) if interleaved else ("heads", both[0].name, both[0].name)
    parts = (
        *made_by(fused, *along, conv1d=conv1d, times=3 if interleaved else 1),
        *more,
        *read_by(output, "heads", conv1d=conv1d),
    )
    return Sublayer("attention", both, parts, counts, config_view=config_view, norm=norm, norm_place=norm_place)


def ffn(
    axis: Axis | str,
    ups: Sequence[str],
    down: str,
    *,
    kind: str = "ffn",
    counts: tuple[Count, ...] = (),
    norm: str = "",
    norm_place: NormPlace = "",
    fused: bool = False,
    conv1d: bool = False,
    optional: bool = False,
    any_of: bool = False,
) -> Sublayer:
    """Matrices that make neurons (`fused`: one with [gate | up]; `any_of`: not all are in every model), and one that
    reads them."""
    along = ("neurons",) * (1 + fused)
    made: list[Part] = [part for up in ups for part in made_by(up, *along, conv1d=conv1d, optional=any_of)]
    return Sublayer(
        kind,
        (neurons(axis) if isinstance(axis, str) else axis,),
        (*made, *read_by(down, "neurons", conv1d=conv1d)),
        counts,
        optional=optional,
        norm=norm,
        norm_place=norm_place,
    )


def tower(row: Family, name: str, path: str, config: str) -> Stack:
    """The only stack of a known row, inside a larger model: under a module's path, sized by a config inside its own."""
    (stack,) = row.stacks
    inside = [
        replace(sublayer, axes=tuple(_inside(axis, config) for axis in sublayer.axes)) for sublayer in stack.sublayers
    ]
    return Stack(name, f"{path}.{stack.layers}", _inside(stack.axis, config), tuple(inside))


def _inside(axis: Axis, config: str) -> Axis:
    width = f"{config}.{axis.width_config}" if axis.width_config else ""
    return replace(axis, config=f"{config}.{axis.config}", width_config=width)
