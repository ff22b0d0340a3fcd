"""Slice a model to the units that a plan keeps: tensors and the module attributes that hold counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .families import FFN, Attention
from .sites import Site, get, input_axis, output_axis, ups


@torch.no_grad()
def slice_(module: Any, index: torch.Tensor, axis: int) -> None:
    """Keep `index` [S] of a matrix (or embedding) along a weight axis, its bias along with the outputs. In place."""
    embedding = isinstance(module, nn.Embedding)
    index = index.to(module.weight.device)
    put_(module, "weight", module.weight.index_select(axis, index))
    outputs = not embedding and axis == output_axis(module)
    if outputs and module.bias is not None:
        put_(module, "bias", module.bias.index_select(0, index))
    if embedding:
        module.embedding_dim = len(index)
    elif type(module).__name__ == "Conv1D":
        module.nx, module.nf = module.weight.shape
    else:
        module.out_features, module.in_features = module.weight.shape


@torch.no_grad()
def put_(module: Any, name: str, value: torch.Tensor) -> None:
    """A new parameter in place of an old one, which stays as it is for whoever undoes the cut (see `undo`)."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad))


def columns_of(units: Sequence[int], width: int) -> torch.Tensor:
    """Column indices [S*width] of consecutive blocks of `width`."""
    return (torch.tensor(list(units))[:, None] * width + torch.arange(width)).flatten()


def kept_heads(site: Site, unit: str, kept: Sequence[int]) -> tuple[list[int], list[int]]:
    """Query heads and KV heads that remain when `kept` heads or KV groups do.

    Raises:
        ValueError: heads that leave the remaining KV groups with different numbers of query heads.
    """
    share = site.heads // site.kv_heads
    if unit == "kv_group":
        return [g * share + j for g in kept for j in range(share)], list(kept)
    groups = sorted({head // share for head in kept})
    if len({sum(head // share == g for head in kept) for g in groups}) != 1:
        raise ValueError(f"{site.name}: every remaining KV group must keep the same number of query heads, got {kept}.")
    return list(kept), groups


def kept_columns(site: Site, unit: str, kept: Sequence[int]) -> torch.Tensor:
    """Input columns of the consumer that remain. [S*H] or [S]."""
    if not site.is_attention:
        return torch.tensor(list(kept))
    return columns_of(kept_heads(site, unit, kept)[0], site.head_dim)


def cut_(layer: nn.Module, site: Site, unit: str, kept: Sequence[int]) -> None:
    """Remove all but the `kept` units of one site from its layer, in place."""
    if isinstance(site.row, Attention):
        _cut_attention_(layer, site, site.row, *kept_heads(site, unit, kept))
    else:
        _cut_ffn_(layer, site, site.row, torch.tensor(list(kept)))


def _cut_attention_(layer: nn.Module, site: Site, row: Attention, heads: list[int], groups: list[int]) -> None:
    q, kv = columns_of(heads, site.head_dim), columns_of(groups, site.head_dim)
    if row.q == row.k:
        offset = site.heads * site.head_dim
        fused = torch.cat([q, offset + kv, offset + site.kv_heads * site.head_dim + kv])
        slice_(get(layer, row.q), fused, output_axis(get(layer, row.q)))
    else:
        for path, index in ((row.q, q), (row.k, kv), (row.v, kv)):
            slice_(get(layer, path), index, output_axis(get(layer, path)))
    out = get(layer, row.out)
    slice_(out, q, input_axis(out))
    embedding = dict(layer.named_modules()).get(row.head_embedding or "")
    if isinstance(embedding, nn.Embedding):
        slice_(embedding, torch.tensor(heads), 1)
    counts = {"heads": len(heads), "kv_heads": len(groups), "groups": len(heads) // len(groups), "columns": len(q)}
    module = get(layer, row.module)
    for attribute, meaning in row.attributes.items():
        setattr(module, attribute, counts[meaning])
    if row.reads_config:
        module.config = LayerConfig(module.config, {row.heads_key: len(heads)})


def _cut_ffn_(layer: nn.Module, site: Site, row: FFN, kept: torch.Tensor) -> None:
    rows = torch.cat([kept, site.columns + kept]) if row.gate_up else kept
    for path in ups(layer, row):
        slice_(get(layer, path), rows, output_axis(get(layer, path)))
    down = get(layer, row.down)
    slice_(down, kept, input_axis(down))
    for attribute in row.attributes:
        setattr(get(layer, row.module or ""), attribute, len(kept))


class LayerConfig:
    """A config seen from one layer: everything is read from the model's config, live, but for a few values."""

    def __init__(self, config: Any, values: dict[str, Any]) -> None:
        inner = config if not isinstance(config, LayerConfig) else config._config
        self.__dict__.update(values, _config=inner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)
