"""The prunable places of a live model, resolved from its family row and sized by its weights.

Shapes: N query heads, G KV heads, H head dim, F FFN width, D hidden width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .families import FFN, Attention, Family, Stack


@dataclass(frozen=True)
class Site:
    """A place with prunable units.

    `columns` is the input width of the consumer: N*H or F. Weights count matrix elements, params also biases and
    embeddings; each is what one unit (a query head, a KV head without its query heads, a neuron) takes with it.
    """

    stack: str
    layer: int
    kind: str
    path: str  # of the layer in the model
    row: Attention | FFN
    columns: int
    heads: int  # N; 0 for an FFN
    kv_heads: int  # G; 0 for an FFN
    unit_weights: int
    unit_params: int
    kv_weights: int
    kv_params: int
    has_bias: bool  # of the consumer
    active: bool = True  # False: this model class never runs it (cross-attention of a lone decoder)

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.stack, self.layer, self.kind)

    @property
    def name(self) -> str:
        return f"{self.stack} layer {self.layer} {self.kind}"

    @property
    def is_attention(self) -> bool:
        return isinstance(self.row, Attention)

    @property
    def head_dim(self) -> int:
        return self.columns // self.heads if self.heads else 1

    @property
    def sizes(self) -> dict[str, int]:
        """Number of units by unit name."""
        if not self.is_attention:
            return {"neuron": self.columns}
        return {"head": self.heads, "kv_group": self.kv_heads}


def find_sites(model: Any, family: Family) -> list[Site]:
    """Sites of all stacks that this model class has, in the order in which the model runs them."""
    if getattr(model.config, "add_cross_attention", False) and not model.config.is_encoder_decoder:
        raise ValueError(
            f"add_cross_attention=True on {family.model_type!r}: cross-attention is only known for "
            "encoder-decoder families. Prune the encoder and the decoder before you join them."
        )
    names = {id(module): name for name, module in model.named_modules()}
    sites = []
    for stack in family.stacks:
        layers = _layers(model, stack)
        for index, layer in enumerate(layers or ()):
            path = names[id(layer)]
            rows = (_placed(row, family, model.config) for row in stack.sublayers)
            sites += [_site(model, layer, path, stack.name, index, row) for row in rows]
    if not sites:
        wanted = ", ".join(stack.layers for stack in family.stacks)
        raise ValueError(f"{type(model).__name__}: none of the layer paths of the {family.model_type} row ({wanted}).")
    return sites


def _placed(row: Attention | FFN, family: Family, config: Any) -> Attention | FFN:
    """The row with its norm behind the sum where this model's config wants it there (OPT-350m)."""
    key = family.post_norm_unless
    return replace(row, norm_place="after") if key and not getattr(config, key) else row


def _layers(model: Any, stack: Stack) -> nn.ModuleList | None:
    """The layers of a stack, or None where the class has no such stack (T5EncoderModel, BartForCausalLM)."""
    with contextlib.suppress(AttributeError):
        return model.base_model.get_submodule(stack.layers)
    return None


def get(layer: nn.Module, path: str) -> Any:
    """A submodule of a layer; raises ValueError that names both when the family row does not fit."""
    try:
        return layer.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{type(layer).__name__} has no {path!r}: the family row does not fit this model.") from None


def ups(layer: nn.Module, row: FFN) -> tuple[str, ...]:
    """The paths of the matrices that produce the neurons: the first alternative of the row that exists."""
    modules = dict(layer.named_modules())
    for paths in row.up:
        if all(path in modules for path in paths):
            return paths
    raise ValueError(f"{type(layer).__name__} has none of {row.up}: the family row does not fit this model.")


def readers(layer: nn.Module, site: Site) -> tuple[str, ...]:
    """The paths of the matrices that read the stream in front of a sublayer (keys and values of cross-attention read
    the encoder)."""
    if not isinstance(site.row, Attention):
        return ups(layer, site.row)
    return (site.row.q,) if site.kind == "cross_attention" else tuple(dict.fromkeys(site.row.producers))


def input_axis(linear: nn.Module) -> int:
    """Axis of `weight` that the input runs along: 1 for nn.Linear [out, in], 0 for GPT-2's Conv1D [in, out]."""
    return 0 if type(linear).__name__ == "Conv1D" else 1


def output_axis(linear: nn.Module) -> int:
    return 1 - input_axis(linear)


def consumer(model: nn.Module, site: Site) -> Any:
    return model.get_submodule(f"{site.path}.{site.row.consumer}")


def _site(model: nn.Module, layer: nn.Module, path: str, stack: str, index: int, row: Attention | FFN) -> Site:
    out = get(layer, row.consumer)
    columns = out.weight.shape[input_axis(out)]
    hidden = out.weight.shape[output_axis(out)]
    heads = kv_heads = kv_weights = kv_params = 0
    if isinstance(row, Attention):
        producers = [get(layer, p) for p in row.producers]
        head_dim = getattr(get(layer, row.module), row.head_dim)
        rows = [p.weight.shape[output_axis(p)] for p in producers]
        heads = columns // head_dim
        kv_heads = (rows[0] - columns) // (2 * head_dim) if row.q == row.k else rows[1] // head_dim
        inputs = [p.weight.shape[input_axis(p)] for p in producers]
        biases = [p.bias is not None for p in producers]
        unit_weights = head_dim * (inputs[0] + hidden)
        unit_params = unit_weights + head_dim * biases[0] + _embedding_rows(layer, row)
        kv_weights = head_dim * (inputs[1] + inputs[2])
        kv_params = kv_weights + head_dim * (biases[1] + biases[2])
    else:
        producers = [get(layer, p) for p in ups(layer, row)]
        rows_a_neuron = 2 if row.gate_up else 1
        unit_weights = hidden + sum(rows_a_neuron * p.weight.shape[input_axis(p)] for p in producers)
        unit_params = unit_weights + sum(rows_a_neuron * (p.bias is not None) for p in producers)
    return Site(
        stack=stack,
        layer=index,
        kind=row.kind,
        path=path,
        row=row,
        columns=columns,
        heads=heads,
        kv_heads=kv_heads,
        unit_weights=unit_weights,
        unit_params=unit_params,
        kv_weights=kv_weights,
        kv_params=kv_params,
        has_bias=out.bias is not None,
    )


def _embedding_rows(layer: nn.Module, row: Attention) -> int:
    embedding = dict(layer.named_modules()).get(row.head_embedding or "")
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else 0
