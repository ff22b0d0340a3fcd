"""The words that rows are written in: axes, and the sublayers that most families have under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..axes import STEM, Argument, Axis, Count, Family, NormPlace, Part, Parts, Stack, Stock, Sublayer, made_by, read_by

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


def channels(config: str, stock: Stock = "none", width: str = "", aligned: bool = True) -> Axis:
    """Channels between two convolutions, which few configs have a key for."""
    return Axis("channels", config, stock, width, aligned=aligned)


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


def experts(
    count: str,
    width: str,
    module: str = "mlp",
    router: str = "gate",
    *,
    routed: str = "num_experts_per_tok",
    split: str = "",
    stock: Stock = "any",
    interleaved: bool = False,
    columns: str = "intermediate_dim",
) -> Sublayer:
    """Experts in three-dimensional tensors, each token sent to some of them by a router, and the neurons of each.

    `stock`: widths that the config can say; `interleaved`: weights are [in, out], gate and up of a neuron lie together;
    `columns`: the attribute that gives the width.
    """
    both = (
        Axis("experts", count, routed=routed, split=split, repeated=("num_experts",)),
        Axis("neurons", width, stock, aligned=True, each=True, step=8),
    )
    at, inputs = f"{module}.experts", 1 if interleaved else 2
    up: dict[str, Any] = {"axes": ("neurons",), "times": 2} if interleaved else {"axes": ("neurons", "neurons")}
    biases = (f"{router}.e_score_correction_bias", "e_score_correction_bias", f"{router}.bias")
    parts = (
        Part(f"{module}.{router}.weight", 0, ("experts",), "routes"),
        *(Part(f"{module}.{bias}", 0, ("experts",), "routes", optional=True) for bias in biases),
        Part(f"{module}.{router}.moe_statics.e_score_correction_bias", 1, ("experts",), "routes", optional=True),
        Part(f"{at}.gate_up_proj", 0, ("experts",)),
        Part(f"{at}.gate_up_proj", 3 - inputs, **up, within="experts"),
        Part(f"{at}.gate_up_proj_bias", 0, ("experts",), "carries", optional=True),
        Part(f"{at}.gate_up_proj_bias", 1, **up, role="carries", within="experts", optional=True),
        Part(f"{at}.down_proj", 0, ("experts",), "carries"),
        Part(f"{at}.down_proj", inputs, ("neurons",), "reads", within="experts"),
        Part(f"{at}.down_proj_bias", 0, ("experts",), "carries", optional=True),
    )
    counts = (
        Count(f"{at}.num_experts", "experts"),
        Count(f"{module}.{router}.num_experts", "experts"),
        Count(f"{at}.{columns}", "neurons", "each"),
    )
    return Sublayer("experts", both, parts, counts, optional=True)


def stem(path: str, *sublayers: Sublayer, only: tuple[str, str, str] | None = None) -> Stack:
    """Convolutions in front of the layers, in the module at a path."""
    return Stack(STEM, path, layers(""), sublayers, only)


def between(axis: Axis, kind: str, maker: str, reader: str, more: Parts = (), *counts: Count) -> Sublayer:
    """What one convolution of a stem makes and the next one reads. `more`: of a norm between them."""
    parts = (*made_by(maker, axis.name), *more, *read_by(reader, axis.name))
    return Sublayer(kind, (axis,), parts, counts, optional=True)


def tower(row: Family, name: str, path: str, config: str) -> Stack:
    """The only stack of a known row, inside a larger model: under a module's path, sized by a config inside its own."""
    (stack,) = row.stacks
    inside = [
        replace(sublayer, axes=tuple(_inside(axis, config) for axis in sublayer.axes)) for sublayer in stack.sublayers
    ]
    return Stack(name, f"{path}.{stack.layers}", _inside(stack.axis, config), tuple(inside))


def _inside(axis: Axis, config: str) -> Axis:
    """The axis with all keys inside that config."""
    keys = {name: getattr(axis, name) for name in ("config", "width_config", "multiple", "routed", "split")}
    inside: dict[str, Any] = {name: f"{config}.{key}" for name, key in keys.items() if key}
    return replace(axis, **inside)
