"""A family is a row of data: where a model type keeps its attention and FFN, and which config keys size them.

To add a family, add a row to `FAMILIES` and a tiny config to `tests/tiny.py`; every generic test then runs on it.
All paths are relative to one layer; `Stack.layers` is relative to `model.base_model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Attention:
    """One attention sublayer. Heads are consecutive blocks of `head_dim` input columns of `out`."""

    kind: str  # "attention" or "cross_attention"
    module: str  # holds the head counts as attributes
    q: str
    k: str
    v: str  # q == k == v: one matrix with rows [q | k | v]
    out: str  # the consumer
    head_dim: str  # attribute of `module` with the size of one head
    heads_key: str  # config key of the number of query heads
    kv_key: str | None = None  # config key of the number of KV heads, None where there are no KV groups
    attributes: dict[str, str] = field(default_factory=dict)  # attribute -> "heads" | "kv_heads" | "groups" | "columns"
    norm: str | None = None
    norm_place: str | None = None  # "after": behind the residual sum (post-LN) · "inside": between projection and sum
    head_argument: str | None = None  # layer argument with the heads on axis 1, handed on by an earlier layer
    head_embedding: str | None = None  # embedding with one column a head (T5's position bias), where present
    reads_config: bool = False  # forward() reads the head count from its config

    @property
    def producers(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v)

    @property
    def consumer(self) -> str:
        return self.out

    @property
    def count_key(self) -> str:
        return self.heads_key


@dataclass(frozen=True)
class FFN:
    """One feed-forward sublayer. Neurons are input columns of `down`."""

    up: tuple[tuple[str, ...], ...]  # alternatives; the first whose paths all exist is meant
    down: str  # the consumer
    width_key: str  # config key of the number of neurons
    gate_up: bool = False  # `up` is one matrix with rows [gate | up]
    module: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)  # attribute of `module` -> "width"
    norm: str | None = None
    norm_place: str | None = None
    kind: str = "ffn"

    @property
    def consumer(self) -> str:
        return self.down

    @property
    def count_key(self) -> str:
        return self.width_key


@dataclass(frozen=True)
class Stack:
    name: str  # "encoder" or "decoder"
    layers: str
    sublayers: tuple[Attention | FFN, ...]  # in the order in which a layer runs them


@dataclass(frozen=True)
class Family:
    model_type: str
    stacks: tuple[Stack, ...]
    stock_heads: str  # head counts that the stock config can express: "any", "divisors" of hidden_size, or "none"
    head_dim_key: str = "head_dim"
    coupled_heads: bool = False  # all attention sites of one kind in a stack keep the same indices
    as_model_type: str | None = None  # same weights, any head count: the explicit door for "divisors"
    post_norm_unless: str | None = None  # config key; the norms stand behind the sum where it is false
    norm_offset: float = 0.0  # norms compute x * (norm_offset + weight)


_EXAMPLE = "FAMILIES['llama'] in hf_prune/model/families.py"


def family_for(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        ValueError: no row for it; the message lists the known families and says how to add one.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"hf_prune has no family row for model_type {model_type!r}. Known: {', '.join(sorted(FAMILIES))}. "
            f"To add one, describe its layers in a row like {_EXAMPLE}."
        )
    return FAMILIES[model_type]


def _bert_like(model_type: str) -> Family:
    attention = Attention(
        kind="attention",
        module="attention.self",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        out="attention.output.dense",
        head_dim="attention_head_size",
        heads_key="num_attention_heads",
        attributes={"num_attention_heads": "heads", "all_head_size": "columns"},
        norm="attention.output.LayerNorm",
        norm_place="after",
    )
    ffn = FFN(
        up=(("intermediate.dense",),),
        down="output.dense",
        width_key="intermediate_size",
        norm="output.LayerNorm",
        norm_place="after",
    )
    return Family(model_type, (Stack("encoder", "encoder.layer", (attention, ffn)),), stock_heads="none")


def _llama_like(
    model_type: str,
    stock_heads: str = "any",
    as_model_type: str | None = None,
    inner_norms: bool = False,
    norm_offset: float = 0.0,
) -> Family:
    attention = Attention(
        kind="attention",
        module="self_attn",
        q="self_attn.q_proj",
        k="self_attn.k_proj",
        v="self_attn.v_proj",
        out="self_attn.o_proj",
        head_dim="head_dim",
        heads_key="num_attention_heads",
        kv_key="num_key_value_heads",
        attributes={"num_key_value_groups": "groups"},
        norm="post_attention_layernorm" if inner_norms else None,
        norm_place="inside" if inner_norms else None,
    )
    ffn = FFN(
        up=(("mlp.gate_proj", "mlp.up_proj"),),
        down="mlp.down_proj",
        width_key="intermediate_size",
        module="mlp",
        attributes={"intermediate_size": "width"},
        norm="post_feedforward_layernorm" if inner_norms else None,
        norm_place="inside" if inner_norms else None,
    )
    stack = Stack("decoder", "layers", (attention, ffn))
    return Family(model_type, (stack,), stock_heads, as_model_type=as_model_type, norm_offset=norm_offset)


def _distilbert() -> Family:
    attention = Attention(
        kind="attention",
        module="attention",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        out="attention.out_lin",
        head_dim="attention_head_size",
        heads_key="n_heads",
        attributes={"n_heads": "heads"},
        norm="sa_layer_norm",
        norm_place="after",
    )
    ffn = FFN(
        up=(("ffn.lin1",),), down="ffn.lin2", width_key="hidden_dim", norm="output_layer_norm", norm_place="after"
    )
    return Family("distilbert", (Stack("encoder", "transformer.layer", (attention, ffn)),), stock_heads="none")


def _gpt2() -> Family:
    attention = Attention(
        kind="attention",
        module="attn",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        out="attn.c_proj",
        head_dim="head_dim",
        heads_key="n_head",
        attributes={"num_heads": "heads", "split_size": "columns"},
    )
    ffn = FFN(up=(("mlp.c_fc",),), down="mlp.c_proj", width_key="n_inner")
    return Family("gpt2", (Stack("decoder", "h", (attention, ffn)),), stock_heads="none")


def _phi3() -> Family:
    attention = Attention(
        kind="attention",
        module="self_attn",
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        out="self_attn.o_proj",
        head_dim="head_dim",
        heads_key="num_attention_heads",
        kv_key="num_key_value_heads",
        attributes={"num_key_value_groups": "groups", "num_key_value_heads": "kv_heads"},
        reads_config=True,
    )
    ffn = FFN(
        up=(("mlp.gate_up_proj",),),
        down="mlp.down_proj",
        width_key="intermediate_size",
        gate_up=True,
    )
    return Family("phi3", (Stack("decoder", "layers", (attention, ffn)),), stock_heads="any")


def _bart_attention(kind: str, module: str, heads_key: str, norm: str, norm_place: str | None) -> Attention:
    return Attention(
        kind=kind,
        module=module,
        q=f"{module}.q_proj",
        k=f"{module}.k_proj",
        v=f"{module}.v_proj",
        out=f"{module}.out_proj",
        head_dim="head_dim",
        heads_key=heads_key,
        attributes={"num_heads": "heads"},
        norm=norm,
        norm_place=norm_place,
    )


def _opt() -> Family:
    attention = _bart_attention("attention", "self_attn", "num_attention_heads", "self_attn_layer_norm", None)
    ffn = FFN(up=(("fc1",),), down="fc2", width_key="ffn_dim", norm="final_layer_norm")
    stack = Stack("decoder", "decoder.layers", (attention, ffn))
    return Family("opt", (stack,), stock_heads="none", post_norm_unless="do_layer_norm_before")


def _bart() -> Family:
    def stack(name: str, cross: bool) -> Stack:
        heads_key = f"{name}_attention_heads"
        sublayers = [_bart_attention("attention", "self_attn", heads_key, "self_attn_layer_norm", "after")]
        if cross:
            norm = "encoder_attn_layer_norm"
            sublayers.append(_bart_attention("cross_attention", "encoder_attn", heads_key, norm, "after"))
        ffn = FFN(up=(("fc1",),), down="fc2", width_key=f"{name}_ffn_dim", norm="final_layer_norm", norm_place="after")
        return Stack(name, f"{name}.layers", (*sublayers, ffn))

    return Family("bart", (stack("encoder", cross=False), stack("decoder", cross=True)), stock_heads="none")


def _t5() -> Family:
    def attention(kind: str, module: str, argument: str) -> Attention:
        return Attention(
            kind=kind,
            module=module,
            q=f"{module}.q",
            k=f"{module}.k",
            v=f"{module}.v",
            out=f"{module}.o",
            head_dim="key_value_proj_dim",
            heads_key="num_heads",
            attributes={"n_heads": "heads", "inner_dim": "columns"},
            head_argument=argument,
            head_embedding=f"{module}.relative_attention_bias",
        )

    def ffn(index: int) -> FFN:
        at = f"layer.{index}.DenseReluDense"
        return FFN(up=((f"{at}.wi",), (f"{at}.wi_0", f"{at}.wi_1")), down=f"{at}.wo", width_key="d_ff")

    self_attention = attention("attention", "layer.0.SelfAttention", "position_bias")
    cross_attention = attention("cross_attention", "layer.1.EncDecAttention", "encoder_decoder_position_bias")
    encoder = Stack("encoder", "encoder.block", (self_attention, ffn(1)))
    decoder = Stack("decoder", "decoder.block", (self_attention, cross_attention, ffn(2)))
    return Family("t5", (encoder, decoder), stock_heads="any", head_dim_key="d_kv", coupled_heads=True)


def _vit() -> Family:
    attention = Attention(
        kind="attention",
        module="attention",
        q="attention.q_proj",
        k="attention.k_proj",
        v="attention.v_proj",
        out="attention.o_proj",
        head_dim="head_dim",
        heads_key="num_attention_heads",
        attributes={"num_attention_heads": "heads"},
    )
    ffn = FFN(up=(("mlp.fc1",),), down="mlp.fc2", width_key="intermediate_size")
    return Family("vit", (Stack("encoder", "layers", (attention, ffn)),), stock_heads="any")


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _bert_like("bert"),
        _bert_like("roberta"),
        _bert_like("electra"),
        _distilbert(),
        _gpt2(),
        _opt(),
        _llama_like("llama", stock_heads="divisors", as_model_type="mistral"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma2", stock_heads="divisors", inner_norms=True, norm_offset=1.0),
        _llama_like("gemma3_text", stock_heads="divisors", inner_norms=True, norm_offset=1.0),
        _phi3(),
        _vit(),
        _t5(),
        _bart(),
    )
}
