"""Language models that read from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..axes import Axis, Count, Family, NormPlace, Part, Stack, Stock, Sublayer, made_by, read_by
from .words import (
    QKV_OUT,
    QKVO,
    attention,
    experts,
    ffn,
    fused_attention,
    grouped_heads,
    heads,
    layers,
    narrowing,
    neurons,
)  # fmt: skip

GATED = ("mlp.gate_proj", "mlp.up_proj")


def decoder(model_type: str, path: str, *sublayers: Sublayer, depth: str = "num_hidden_layers") -> Family:
    return Family(model_type, (Stack("decoder", path, layers(depth), sublayers),))


def llama_attention(
    stock: Stock = "any",
    norm: str = "",
    *,
    output: str = "o_proj",
    times: int = 1,
    more: tuple[Part, ...] = (),
    optional: bool = False,
) -> Sublayer:
    """`norm`: between the projection and the sum."""
    return attention(
        "self_attn",
        grouped_heads("num_attention_heads", "num_key_value_heads", "self_attn.head_dim", stock),
        (*QKVO[:3], output),
        (Count("self_attn.num_key_value_groups", "heads", "each"),),
        norm=norm,
        norm_place="inside" if norm else "",
        times=times,
        more=more,
        optional=optional,
    )


def llama_ffn(
    norm: str = "",
    ups: Sequence[str] = GATED,
    down: str = "mlp.down_proj",
    *,
    config: str = "intermediate_size",
    count: bool = True,
    fused: bool = False,
    kind: str = "ffn",
    optional: bool = False,
) -> Sublayer:
    """`count`: the module says how many neurons it has."""
    module = down.rpartition(".")[0]
    place: NormPlace = "inside" if norm else ""
    counts = (Count(f"{module}.intermediate_size", "neurons"),) if count else ()
    return ffn(config, ups, down, kind=kind, counts=counts, norm=norm, norm_place=place, fused=fused, optional=optional)


def llama_like(
    model_type: str, stock: Stock = "any", as_model_type: str = "", inner_norms: Sequence[str] = (), offset: float = 0.0
) -> Family:
    """`inner_norms`: between projections and sums, of attention and FFN."""
    first, second = inner_norms or ("", "")
    stack = Stack("decoder", "layers", layers("num_hidden_layers"), (llama_attention(stock, first), llama_ffn(second)))
    return Family(model_type, (stack,), as_model_type=as_model_type, norm_offset=offset)


def gpt2() -> Family:
    itself = fused_attention(
        heads("n_head", "attn.head_dim"),
        "attn.c_attn",
        "attn.c_proj",
        (Count("attn.num_heads", "heads"), Count("attn.split_size", "heads", "columns")),
        conv1d=True,
    )
    return decoder("gpt2", "h", itself, ffn("n_inner", ["mlp.c_fc"], "mlp.c_proj", conv1d=True), depth="n_layer")


def phi3() -> Family:
    itself = fused_attention(
        grouped_heads("num_attention_heads", "num_key_value_heads", "self_attn.head_dim", "any"),
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        (
            Count("self_attn.num_key_value_groups", "heads", "each"),
            Count("self_attn.num_key_value_heads", "kv_groups"),
        ),
        config_view="self_attn",
    )
    return decoder("phi3", "layers", itself, llama_ffn(ups=["mlp.gate_up_proj"], count=False, fused=True))


def opt_like(
    model_type: str,
    path: str,
    width: str,
    heads_key: str = "num_attention_heads",
    columns: str = "",
    post_norm_unless: str = "",
) -> Family:
    """BART's names, norms in front (OPT-350m: behind the sums). `columns`: the attribute that gives them."""
    columns_ = (Count(columns, "heads", "columns"),) if columns else ()
    itself = attention(
        "self_attn",
        heads(heads_key, "self_attn.head_dim"),
        QKV_OUT,
        (Count("self_attn.num_heads", "heads"), *columns_),
        norm="self_attn_layer_norm",
    )
    neurons_ = ffn(width, ["fc1"], "fc2", norm="final_layer_norm")
    stack = Stack("decoder", path, layers("num_hidden_layers"), (itself, neurons_))
    return Family(model_type, (stack,), post_norm_unless=post_norm_unless)


def glm(model_type: str, inner_norms: Sequence[str] = ("", "")) -> Family:
    first, second = inner_norms
    neurons_ = llama_ffn(second, ["mlp.gate_up_proj"], count=False, fused=True)
    return decoder(model_type, "layers", llama_attention("any", first), neurons_)


def ungated(model_type: str, stock: Stock = "any", up: str = "mlp.up_proj", down: str = "mlp.down_proj") -> Family:
    """Llama's attention, before one up and one down projection."""
    return decoder(model_type, "layers", llama_attention(stock), llama_ffn(ups=[up], down=down, count=False))


def phi() -> Family:
    neurons_ = llama_ffn(ups=["mlp.fc1"], down="mlp.fc2", count=False)
    return decoder("phi", "layers", llama_attention("any", output="dense"), neurons_)


def gpt_neox(model_type: str) -> Family:
    itself = fused_attention(
        heads("num_attention_heads", "attention.head_size"),
        "attention.query_key_value",
        "attention.dense",
        (),
        interleaved=True,
    )
    neurons_ = ffn("intermediate_size", ["mlp.dense_h_to_4h"], "mlp.dense_4h_to_h")
    return decoder(model_type, "layers", itself, neurons_)


def gptj() -> Family:
    counts = (Count("attn.num_attention_heads", "heads"), Count("attn.embed_dim", "heads", "columns"))
    itself = attention("attn", heads("n_head", "attn.head_dim"), QKV_OUT, counts)
    return decoder("gptj", "h", itself, ffn("n_inner", ["mlp.fc_in"], "mlp.fc_out"), depth="n_layer")


def sinks() -> tuple[Part, ...]:
    """A logit of each head that stands for no token."""
    return (Part("self_attn.sinks", 0, ("heads",), "carries", single=True, optional=True),)


def neurons_alone(model_type: str, path: str, axis: Axis | str, up: str, down: str, **options: str) -> Family:
    """Without heads, for a reason that the table below gives."""
    return decoder(model_type, path, ffn(axis, [up], down), **options)


def experts_among(model_type: str, *others: Sublayer, more: tuple[Part, ...] = (), stock: Stock = "any") -> Family:
    """Llama's attention before experts, or (in some layers) before a dense FFN."""
    return decoder(model_type, "layers", llama_attention(stock, more=more), *others)


def latent_attention() -> Sublayer:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): queries, and keys with values, of all heads come from a
    narrow vector each, and are wider than what the output projection reads of a head."""
    axis = replace(heads("num_attention_heads", "self_attn.v_head_dim", "any", ""), also=("num_key_value_heads",))
    query, key_value = "self_attn.qk_head_dim", "self_attn.qk_nope_head_dim+self_attn.v_head_dim"
    return Sublayer(
        "attention",
        (axis,),
        (
            *made_by("self_attn.q_b_proj", "heads", optional=True, width=query),
            *made_by("self_attn.q_proj", "heads", optional=True, width=query),
            *made_by("self_attn.kv_b_proj", "heads", width=key_value),
            *read_by("self_attn.o_proj", "heads"),
        ),
        (Count("self_attn.num_heads", "heads"),),
    )


def dense_among() -> Sublayer:
    return llama_ffn(count=False, optional=True)


def beside_shared(model_type: str, attention: Sublayer, count: str, shared: str, **options: str) -> Family:
    """Experts beside shared ones, which are one FFN as wide as several of them; dense layers in front.

    `shared`: key of how many.
    """
    axis = replace(neurons("moe_intermediate_size"), multiple=shared, step=8)
    at = "mlp.shared_experts"
    beside = ffn(axis, [f"{at}.gate_proj", f"{at}.up_proj"], f"{at}.down_proj", kind="shared_ffn", optional=True)
    mixed = experts(count, "moe_intermediate_size", **options)  # type: ignore[arg-type]
    return decoder(model_type, "layers", attention, dense_among(), mixed, beside)


def shared_expert() -> Sublayer:
    at = "mlp.shared_expert"
    ups, down = (f"{at}.gate_proj", f"{at}.up_proj"), f"{at}.down_proj"
    width = "shared_expert_intermediate_size"
    return llama_ffn(ups=ups, down=down, config=width, count=False, kind="shared_ffn", optional=True)


def qwen3_5(model_type: str, *neurons_: Sublayer) -> Family:
    """Layers of linear attention are left whole; the others make a gate beside each query."""
    return decoder(model_type, "layers", llama_attention("any", times=2, optional=True), *neurons_)


def lfm2() -> Family:
    """Layers of convolutions are left whole."""
    ups, down = ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2"
    neurons_ = ffn(neurons("intermediate_size", "none"), ups, down)  # the class adjusts the key that it is given
    return decoder("lfm2", "layers", llama_attention("any", output="out_proj", optional=True), neurons_)


QWEN_EXPERTS = ("num_experts", "moe_intermediate_size")
INNER = ("post_attention_layernorm", "post_feedforward_layernorm")

DECODERS = (
    narrowing(gpt2(), "n_embd"),
    narrowing(
        opt_like("opt", "decoder.layers", "ffn_dim", post_norm_unless="do_layer_norm_before"),
        "hidden_size",
        "word_embed_proj_dim",
    ),
    opt_like("biogpt", "layers", "intermediate_size"),
    opt_like("xglm", "layers", "ffn_dim", "attention_heads", "self_attn.embed_dim"),
    narrowing(llama_like("llama", "divisors", as_model_type="mistral")),
    *(narrowing(llama_like(name)) for name in ("mistral", "qwen2", "qwen3", "granite", "smollm3")),
    *map(llama_like, ("olmo", "cohere", "cohere2")),
    *map(llama_like, ("seed_oss", "ernie4_5", "hunyuan_v1_dense", "ministral", "ministral3", "cwm")),
    llama_like("gemma", offset=1.0),
    llama_like("helium", "none"),  # its output projection is as wide as the stream
    # a norm of each head is a module of its own
    decoder("stablelm", "layers", llama_ffn()),
    *(llama_like(name, "divisors", inner_norms=INNER, offset=1.0) for name in ("gemma2", "gemma3_text")),
    llama_like("exaone4", inner_norms=INNER),
    phi3(),
    glm("glm"),
    glm("glm4", ("post_self_attn_layernorm", "post_mlp_layernorm")),
    *map(ungated, ("arcee", "apertus", "nemotron", "jais2")),
    ungated("starcoder2", up="mlp.c_fc", down="mlp.c_proj"),
    ungated("nanochat", up="mlp.fc1", down="mlp.fc2"),
    phi(),
    gpt_neox("gpt_neox"),
    gptj(),
    # queries, keys and values of all heads of a group lie together, or (multi-query) those of a group without a key
    neurons_alone("falcon", "h", "ffn_hidden_size", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    # queries, values and keys lie in four blocks
    neurons_alone("codegen", "h", "n_inner", "mlp.fc_in", "mlp.fc_out", depth="n_layer"),
    # one head of keys and values has no key in the config
    neurons_alone("gpt_bigcode", "h", "n_inner", "mlp.c_fc", "mlp.c_proj", depth="n_layer"),
    # ALiBi: a head's slope follows from its number, and from how many there are
    neurons_alone("bloom", "h", neurons("n_inner", "none"), "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", depth="n_layer"),
    # one norm spans the queries of all heads: with fewer of them it gives other values
    *(decoder(name, "layers", llama_ffn(INNER[1])) for name in ("olmo2", "olmo3")),
    experts_among("mixtral", experts("num_local_experts", "intermediate_size")),
    experts_among("granitemoe", experts("num_local_experts", "intermediate_size", "block_sparse_moe", "router")),
    experts_among("qwen2_moe", dense_among(), shared_expert(), experts(*QWEN_EXPERTS)),
    experts_among("qwen3_moe", dense_among(), experts(*QWEN_EXPERTS)),
    beside_shared("glm4_moe", llama_attention(), "n_routed_experts", "n_shared_experts", split="n_group"),
    beside_shared("ernie4_5_moe", llama_attention(), "moe_num_experts", "moe_num_shared_experts", routed="moe_k"),
    beside_shared("hy_v3", llama_attention(), "num_experts", "num_shared_experts"),
    beside_shared("deepseek_v3", latent_attention(), "n_routed_experts", "n_shared_experts", split="n_group"),
    experts_among(
        "gpt_oss",
        experts(
            "num_local_experts", "intermediate_size", router="router", interleaved=True, columns="intermediate_size"
        ),
        more=sinks(),
    ),
    qwen3_5("qwen3_5_text", llama_ffn()),
    qwen3_5("qwen3_5_moe_text", shared_expert(), experts(*QWEN_EXPERTS)),
    qwen3_5("qwen3_next", dense_among(), shared_expert(), experts(*QWEN_EXPERTS)),
    lfm2(),
)
