"""Models of sound."""

from __future__ import annotations

from dataclasses import replace

from ..axes import Axis, Count, Family, NormPlace, Part, Stack, Sublayer
from .encoder_decoders import bart_like
from .words import QKV_OUT, attention, between, channels, ffn, heads, layers, stem


def sound_ffn(place: NormPlace) -> Sublayer:
    ups, down = ["feed_forward.intermediate_dense"], "feed_forward.output_dense"
    return ffn("intermediate_size", ups, down, norm="final_layer_norm", norm_place=place)


CONVOLUTIONS = ("", "second_", "third_", "fourth_", "fifth_", "sixth_", "seventh_", "eighth_")  # by whose channels
NORMED = "a LayerNorm over all of them stands behind each convolution, and without some it would give others"


def sound_stem() -> Stack:
    """The channels between two convolutions, each sized by an entry of a list. Behind the first one stands a norm with
    a group for each channel; the last one's channels stay, as a LayerNorm over all of them reads them."""

    def row(i: int, number: str) -> Sublayer:
        here, following = (f"conv_layers.{j}" for j in (i, i + 1))
        norm = (Part(f"{here}.layer_norm.{x}", 0, ("channels",), "carries", optional=True) for x in ("weight", "bias"))
        return between(
            channels(f"conv_dim.{i}", "any"),
            f"{number}convolution",
            f"{here}.conv",
            f"{following}.conv",
            tuple(norm),
            Count(f"{here}.out_conv_dim", "channels"),
            Count(f"{following}.in_conv_dim", "channels"),
        )

    rows = (row(i, number) for i, number in enumerate(CONVOLUTIONS))
    return stem("feature_extractor", *rows, only=("feat_extract_norm", "group", NORMED))


def sound_encoder(
    model_type: str,
    *sublayers: Sublayer,
    depth: Axis | None = None,
    post_norm_unless: str = "",
    normed: bool = False,
) -> Family:
    """`normed`: every convolution in front of the layers has a LayerNorm."""
    stack = Stack("encoder", "encoder.layers", depth or layers("num_hidden_layers"), sublayers)
    if normed:
        return Family(model_type, (stack,), post_norm_unless=post_norm_unless, refused=(("channels", NORMED),))
    return Family(model_type, (sound_stem(), stack), post_norm_unless=post_norm_unless)


def wav2vec2_like(model_type: str, post_norm_unless: str = "do_stable_layer_norm", normed: bool = False) -> Family:
    place: NormPlace = "" if post_norm_unless else "after"
    itself = attention(
        "attention",
        heads("num_attention_heads", "attention.head_dim"),
        QKV_OUT,
        (Count("attention.num_heads", "heads"),),
        norm="layer_norm",
        norm_place=place,
    )
    return sound_encoder(model_type, itself, sound_ffn(place), post_norm_unless=post_norm_unless, normed=normed)


def wavlm() -> Family:
    """Without heads: a bias for each of them, and for each example in one axis, is handed from layer to layer."""
    depth = layers("num_hidden_layers", (0,))
    return sound_encoder("wavlm", sound_ffn(""), depth=depth, post_norm_unless="do_stable_layer_norm")


def whisper() -> Family:
    """Its two convolutions make as many channels as the stream is wide; fewer between them have a key of their own."""
    row, channels_ = bart_like("whisper", ""), between(channels("stem_channels"), "convolution", "conv1", "conv2")
    return replace(row, stacks=(stem("encoder", channels_), *row.stacks))


SPEECH = (
    *map(wav2vec2_like, ("wav2vec2", "hubert", "unispeech", "unispeech-sat")),
    wav2vec2_like("data2vec-audio", "", normed=True),
    wavlm(),
    whisper(),
)
