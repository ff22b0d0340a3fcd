"""Models of sound."""

from __future__ import annotations

from ..axes import Axis, Count, Family, NormPlace, Stack, Sublayer
from .encoder_decoders import bart_like
from .words import QKV_OUT, attention, ffn, heads, layers


def sound_ffn(place: NormPlace) -> Sublayer:
    ups, down = ["feed_forward.intermediate_dense"], "feed_forward.output_dense"
    return ffn("intermediate_size", ups, down, norm="final_layer_norm", norm_place=place)


def sound_encoder(
    model_type: str, *sublayers: Sublayer, depth: Axis | None = None, post_norm_unless: str = ""
) -> Family:
    stack = Stack("encoder", "encoder.layers", depth or layers("num_hidden_layers"), sublayers)
    return Family(model_type, (stack,), post_norm_unless=post_norm_unless)


def wav2vec2_like(model_type: str, post_norm_unless: str = "do_stable_layer_norm") -> Family:
    place: NormPlace = "" if post_norm_unless else "after"
    itself = attention(
        "attention",
        heads("num_attention_heads", "attention.head_dim"),
        QKV_OUT,
        (Count("attention.num_heads", "heads"),),
        norm="layer_norm",
        norm_place=place,
    )
    return sound_encoder(model_type, itself, sound_ffn(place), post_norm_unless=post_norm_unless)


def wavlm() -> Family:
    """Without heads: a bias for each of them, and for each example in one axis, is handed from layer to layer."""
    depth = layers("num_hidden_layers", (0,))
    return sound_encoder("wavlm", sound_ffn(""), depth=depth, post_norm_unless="do_stable_layer_norm")


SPEECH = (
    *map(wav2vec2_like, ("wav2vec2", "hubert", "unispeech", "unispeech-sat")),
    wav2vec2_like("data2vec-audio", ""),
    wavlm(),
    bart_like("whisper", ""),
)
