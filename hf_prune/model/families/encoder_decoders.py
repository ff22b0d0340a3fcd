"""Models with an encoder and a decoder, which also reads what the encoder gives."""

from __future__ import annotations

from ..axes import Argument, Count, Family, NormPlace, Part, Stack, Sublayer
from .words import QKV_OUT, attention, ffn, heads, layers


def bart_attention(
    kind: str, module: str, config: str, norm: str, place: NormPlace, source: str = "", columns: str = ""
) -> Sublayer:
    """`columns`: the attribute that gives those of all heads."""
    told = (Count(f"{module}.{columns}", "heads", "columns"),) if columns else ()
    return attention(
        module,
        heads(config, f"{module}.head_dim"),
        QKV_OUT,
        (Count(f"{module}.num_heads", "heads"), *told),
        kind=kind,
        norm=norm,
        norm_place=place,
        source=source,
    )


def bart_like(model_type: str, place: NormPlace = "after", columns: str = "") -> Family:
    """`place`: of the norms; without, they stand in front."""

    def stack(name: str, cross: bool) -> Stack:
        config = f"{name}_attention_heads"
        sublayers = [bart_attention("attention", "self_attn", config, "self_attn_layer_norm", place, "", columns)]
        if cross:
            norm = "encoder_attn_layer_norm"
            sublayers.append(bart_attention("cross_attention", "encoder_attn", config, norm, place, "encoder", columns))
        neurons = ffn(f"{name}_ffn_dim", ["fc1"], "fc2", norm="final_layer_norm", norm_place=place)
        return Stack(name, f"{name}.layers", layers(f"{name}_layers"), (*sublayers, neurons))

    return Family(model_type, (stack("encoder", cross=False), stack("decoder", cross=True)))


def t5_like(model_type: str, shared_bias: bool = True) -> Family:
    """`shared_bias`: the first layer's position bias is handed to all later ones, which so keep the same heads."""

    def itself(kind: str, module: str, argument: str, source: str = "") -> Sublayer:
        bias = f"{module}.relative_attention_bias.weight"
        return attention(
            module,
            heads("num_heads", f"{module}.key_value_proj_dim", "any", "d_kv", tied=shared_bias),
            ("q", "k", "v", "o"),
            (Count(f"{module}.n_heads", "heads"), Count(f"{module}.inner_dim", "heads", "columns")),
            kind=kind,
            source=source,
            more=(Part(bias, 1, ("heads",), "carries", single=True, optional=True),),
            arguments=(Argument(argument, 1, "heads"),) if shared_bias else (),
        )

    def neurons(index: int) -> Sublayer:
        at = f"layer.{index}.DenseReluDense"
        return ffn("d_ff", [f"{at}.{name}" for name in ("wi", "wi_0", "wi_1")], f"{at}.wo", any_of=True)

    own = itself("attention", "layer.0.SelfAttention", "position_bias")
    cross = itself("cross_attention", "layer.1.EncDecAttention", "encoder_decoder_position_bias", "encoder")
    fixed = (0,) if shared_bias else ()
    encoder = Stack("encoder", "encoder.block", layers("num_layers", fixed), (own, neurons(1)))
    decoder = Stack("decoder", "decoder.block", layers("num_decoder_layers", fixed), (own, cross, neurons(2)))
    return Family(model_type, (encoder, decoder))


ENCODER_DECODERS = (
    t5_like("t5"),
    t5_like("mt5"),
    t5_like("umt5", shared_bias=False),
    *map(bart_like, ("bart", "marian", "blenderbot-small", "plbart")),
    bart_like("mvp", columns="embed_dim"),
    *(bart_like(name, "") for name in ("mbart", "pegasus", "m2m_100", "blenderbot")),
)
