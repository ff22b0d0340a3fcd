"""The families that are known: a row of data for each model type.

To add a family, add a row to `FAMILIES` and a tiny config to `tests/tiny.py`; every generic test then runs on it.
"""

from __future__ import annotations

from dataclasses import replace

from .axes import Argument, Axis, Count, Family, Part, Stack, Stock, Sublayer, made_by, read_by

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


def registered(model_type: str) -> Family | None:
    """The hand-written or registered row of a model type."""
    return FAMILIES.get(model_type)


def heads(config: str, width: str, stock: Stock = "none", width_config: str = "head_dim", tied: bool = False) -> Axis:
    """Query heads that each have their own keys and values."""
    return Axis("heads", config, stock, width, width_config, alias="kv_groups", tied=tied, mixes=True)


def grouped_heads(config: str, kv_config: str, width: str, stock: Stock) -> tuple[Axis, Axis]:
    """KV heads with the query heads that share them, and those query heads."""
    inner = replace(heads(config, width, stock), alias="")
    return Axis("kv_groups", kv_config, stock, width, "head_dim"), inner


def neurons(config: str) -> Axis:
    return Axis("neurons", config, aligned=True)


def layers(config: str, fixed: tuple[int, ...] = ()) -> Axis:
    return Axis("layers", config, fixed=fixed)


def _bert_like(model_type: str) -> Family:
    attention = Sublayer(
        "attention",
        (heads("num_attention_heads", "attention.self.attention_head_size"),),
        (
            *made_by("attention.self.query", "heads"),
            *made_by("attention.self.key", "heads"),
            *made_by("attention.self.value", "heads"),
            *read_by("attention.output.dense", "heads"),
        ),
        (
            Count("attention.self.num_attention_heads", "heads"),
            Count("attention.self.all_head_size", "heads", "columns"),
        ),
        norm="attention.output.LayerNorm",
        norm_place="after",
    )
    ffn = Sublayer(
        "ffn",
        (neurons("intermediate_size"),),
        (*made_by("intermediate.dense", "neurons"), *read_by("output.dense", "neurons")),
        norm="output.LayerNorm",
        norm_place="after",
    )
    return Family(model_type, (Stack("encoder", "encoder.layer", layers("num_hidden_layers"), (attention, ffn)),))


def _llama_like(
    model_type: str, stock: Stock = "any", as_model_type: str = "", inner_norms: bool = False, norm_offset: float = 0.0
) -> Family:
    attention = Sublayer(
        "attention",
        grouped_heads("num_attention_heads", "num_key_value_heads", "self_attn.head_dim", stock),
        (
            *made_by("self_attn.q_proj", "heads"),
            *made_by("self_attn.k_proj", "kv_groups"),
            *made_by("self_attn.v_proj", "kv_groups"),
            *read_by("self_attn.o_proj", "heads"),
        ),
        (Count("self_attn.num_key_value_groups", "heads", "each"),),
        norm="post_attention_layernorm" if inner_norms else "",
        norm_place="inside" if inner_norms else "",
    )
    ffn = Sublayer(
        "ffn",
        (neurons("intermediate_size"),),
        (
            *made_by("mlp.gate_proj", "neurons"),
            *made_by("mlp.up_proj", "neurons"),
            *read_by("mlp.down_proj", "neurons"),
        ),
        (Count("mlp.intermediate_size", "neurons"),),
        norm="post_feedforward_layernorm" if inner_norms else "",
        norm_place="inside" if inner_norms else "",
    )
    stack = Stack("decoder", "layers", layers("num_hidden_layers"), (attention, ffn))
    return Family(model_type, (stack,), as_model_type=as_model_type, norm_offset=norm_offset)


def _distilbert() -> Family:
    attention = Sublayer(
        "attention",
        (heads("n_heads", "attention.attention_head_size"),),
        (
            *made_by("attention.q_lin", "heads"),
            *made_by("attention.k_lin", "heads"),
            *made_by("attention.v_lin", "heads"),
            *read_by("attention.out_lin", "heads"),
        ),
        (Count("attention.n_heads", "heads"),),
        norm="sa_layer_norm",
        norm_place="after",
    )
    ffn = Sublayer(
        "ffn",
        (neurons("hidden_dim"),),
        (*made_by("ffn.lin1", "neurons"), *read_by("ffn.lin2", "neurons")),
        norm="output_layer_norm",
        norm_place="after",
    )
    return Family("distilbert", (Stack("encoder", "transformer.layer", layers("n_layers"), (attention, ffn)),))


def _gpt2() -> Family:
    attention = Sublayer(
        "attention",
        (heads("n_head", "attn.head_dim"),),
        (
            *made_by("attn.c_attn", "heads", "heads", "heads", conv1d=True),
            *read_by("attn.c_proj", "heads", conv1d=True),
        ),
        (Count("attn.num_heads", "heads"), Count("attn.split_size", "heads", "columns")),
    )
    ffn = Sublayer(
        "ffn",
        (neurons("n_inner"),),
        (*made_by("mlp.c_fc", "neurons", conv1d=True), *read_by("mlp.c_proj", "neurons", conv1d=True)),
    )
    return Family("gpt2", (Stack("decoder", "h", layers("n_layer"), (attention, ffn)),))


def _phi3() -> Family:
    attention = Sublayer(
        "attention",
        grouped_heads("num_attention_heads", "num_key_value_heads", "self_attn.head_dim", "any"),
        (
            *made_by("self_attn.qkv_proj", "heads", "kv_groups", "kv_groups"),
            *read_by("self_attn.o_proj", "heads"),
        ),
        (
            Count("self_attn.num_key_value_groups", "heads", "each"),
            Count("self_attn.num_key_value_heads", "kv_groups"),
        ),
        config_view="self_attn",
    )
    ffn = Sublayer(
        "ffn",
        (neurons("intermediate_size"),),
        (*made_by("mlp.gate_up_proj", "neurons", "neurons"), *read_by("mlp.down_proj", "neurons")),
    )
    return Family("phi3", (Stack("decoder", "layers", layers("num_hidden_layers"), (attention, ffn)),))


def _bart_attention(kind: str, module: str, config: str, norm: str, norm_place: str, source: str = "") -> Sublayer:
    return Sublayer(
        kind,
        (heads(config, f"{module}.head_dim"),),
        (
            *made_by(f"{module}.q_proj", "heads"),
            *made_by(f"{module}.k_proj", "heads", source=source),
            *made_by(f"{module}.v_proj", "heads", source=source),
            *read_by(f"{module}.out_proj", "heads"),
        ),
        (Count(f"{module}.num_heads", "heads"),),
        norm=norm,
        norm_place=norm_place,  # type: ignore[arg-type]
    )


def _fc_ffn(config: str, norm_place: str) -> Sublayer:
    return Sublayer(
        "ffn",
        (neurons(config),),
        (*made_by("fc1", "neurons"), *read_by("fc2", "neurons")),
        norm="final_layer_norm",
        norm_place=norm_place,  # type: ignore[arg-type]
    )


def _opt() -> Family:
    attention = _bart_attention("attention", "self_attn", "num_attention_heads", "self_attn_layer_norm", "")
    stack = Stack("decoder", "decoder.layers", layers("num_hidden_layers"), (attention, _fc_ffn("ffn_dim", "")))
    return Family("opt", (stack,), post_norm_unless="do_layer_norm_before")


def _bart() -> Family:
    def stack(name: str, cross: bool) -> Stack:
        config = f"{name}_attention_heads"
        sublayers = [_bart_attention("attention", "self_attn", config, "self_attn_layer_norm", "after")]
        if cross:
            norm = "encoder_attn_layer_norm"
            sublayers.append(_bart_attention("cross_attention", "encoder_attn", config, norm, "after", "encoder"))
        return Stack(
            name, f"{name}.layers", layers(f"{name}_layers"), (*sublayers, _fc_ffn(f"{name}_ffn_dim", "after"))
        )

    return Family("bart", (stack("encoder", cross=False), stack("decoder", cross=True)))


def _t5() -> Family:
    def attention(kind: str, module: str, argument: str, source: str = "") -> Sublayer:
        bias = f"{module}.relative_attention_bias"
        return Sublayer(
            kind,
            (heads("num_heads", f"{module}.key_value_proj_dim", "any", "d_kv", tied=True),),
            (
                *made_by(f"{module}.q", "heads"),
                *made_by(f"{module}.k", "heads", source=source),
                *made_by(f"{module}.v", "heads", source=source),
                *read_by(f"{module}.o", "heads"),
                Part(f"{bias}.weight", 1, ("heads",), "carries", single=True, optional=True),
            ),
            (Count(f"{module}.n_heads", "heads"), Count(f"{module}.inner_dim", "heads", "columns")),
            (Argument(argument, 1, "heads"),),
        )

    def ffn(index: int) -> Sublayer:
        at = f"layer.{index}.DenseReluDense"
        up = (part for name in ("wi", "wi_0", "wi_1") for part in made_by(f"{at}.{name}", "neurons", optional=True))
        return Sublayer("ffn", (neurons("d_ff"),), (*up, *read_by(f"{at}.wo", "neurons")))

    itself = attention("attention", "layer.0.SelfAttention", "position_bias")
    cross = attention("cross_attention", "layer.1.EncDecAttention", "encoder_decoder_position_bias", "encoder")
    first = (0,)  # its position bias is handed to all later layers
    encoder = Stack("encoder", "encoder.block", layers("num_layers", fixed=first), (itself, ffn(1)))
    decoder = Stack("decoder", "decoder.block", layers("num_decoder_layers", fixed=first), (itself, cross, ffn(2)))
    return Family("t5", (encoder, decoder))


def _vit() -> Family:
    attention = Sublayer(
        "attention",
        (heads("num_attention_heads", "attention.head_dim", "any"),),
        (
            *made_by("attention.q_proj", "heads"),
            *made_by("attention.k_proj", "heads"),
            *made_by("attention.v_proj", "heads"),
            *read_by("attention.o_proj", "heads"),
        ),
        (Count("attention.num_attention_heads", "heads"),),
    )
    ffn = Sublayer(
        "ffn", (neurons("intermediate_size"),), (*made_by("mlp.fc1", "neurons"), *read_by("mlp.fc2", "neurons"))
    )
    return Family("vit", (Stack("encoder", "layers", layers("num_hidden_layers"), (attention, ffn)),))


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _bert_like("bert"),
        _bert_like("roberta"),
        _bert_like("electra"),
        _distilbert(),
        _gpt2(),
        _opt(),
        _llama_like("llama", "divisors", as_model_type="mistral"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma2", "divisors", inner_norms=True, norm_offset=1.0),
        _llama_like("gemma3_text", "divisors", inner_norms=True, norm_offset=1.0),
        _phi3(),
        _vit(),
        _t5(),
        _bart(),
    )
}
