"""Models of pictures, and of pictures beside text."""

from __future__ import annotations

from collections.abc import Callable

from ..axes import Count, Family, Part, Parts, Stack, Stock, Sublayer
from .encoders import bert_ffn, encoder
from .words import QKV_OUT, attention, channels, ffn, heads, layers, narrowing, neurons, tower


def vit_attention(stock: Stock = "any", count: str = "num_attention_heads", more: Parts = ()) -> Sublayer:
    counts = (Count(f"attention.{count}", "heads"),)
    axis = heads("num_attention_heads", "attention.head_dim", stock)
    return attention("attention", axis, counts=counts, more=more)


def distances(path: str) -> Parts:
    """A bias for each distance, a column of each head."""
    return (Part(f"{path}.relative_position_bias_table", 1, ("heads",), "carries", single=True, optional=True),)


def vit_like(model_type: str, more: Parts = ()) -> Family:
    neurons_ = ffn("intermediate_size", ["mlp.fc1"], "mlp.fc2")
    return encoder(model_type, "layers", vit_attention(more=more), neurons_)


def old_vit(model_type: str) -> Family:
    """ViT's names until transformers 5, which are BERT's but for the norms."""
    at = "attention.attention"
    itself = attention(
        "attention",
        heads("num_attention_heads", f"{at}.attention_head_size"),
        ("attention.query", "attention.key", "attention.value", "output.dense"),
        (Count(f"{at}.num_attention_heads", "heads"), Count(f"{at}.all_head_size", "heads", "columns")),
        more=distances(f"{at}.relative_position_bias"),
    )
    return encoder(model_type, "encoder.layer", itself, bert_ffn(""))


def dinov2(model_type: str) -> Family:
    """The class derives the FFN's width from a multiple of the stream's; a narrower one has a key of its own."""
    width = neurons("intermediate_size", "none")
    plain = ffn(width, ["mlp.fc1"], "mlp.fc2", optional=True)
    gated = ffn(width, ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj", optional=True)
    return encoder(model_type, "encoder.layer", vit_attention(), plain, gated)


def dinov3() -> Family:
    ups = ["mlp.gate_proj", "mlp.up_proj"]
    neurons_ = ffn("intermediate_size", ups, "mlp.down_proj", any_of=True)
    return encoder("dinov3_vit", "layer", vit_attention("none", "num_heads"), neurons_)


def clip_tower(model_type: str, stock: Stock = "any") -> Family:
    """`stock`: of the FFN, none where a pooling head is sized by the same key."""
    counts = (Count("self_attn.num_heads", "heads"),)
    itself = attention("self_attn", heads("num_attention_heads", "self_attn.head_dim"), QKV_OUT, counts)
    return encoder(
        model_type, "encoder.layers", itself, ffn(neurons("intermediate_size", stock), ["mlp.fc1"], "mlp.fc2")
    )


def two_towers(model_type: str, stock: Stock = "any") -> Family:
    text = tower(clip_tower(""), "text", "text_model", "text_config")
    return Family(model_type, (text, tower(clip_tower("", stock), "vision", "vision_model", "vision_config")))


# --- convolutions ----------------------------------------------------------------------------------------------------

STAGES = 6  # at most; four in what is published
STATISTICS = ("weight", "bias", "running_mean", "running_var")


def normed(path: str, name: str = "convolution") -> Parts:
    """The channels that a convolution makes, with the batch norm behind it."""
    norm = (Part(f"{path}.normalization.{each}", 0, ("channels",), "carries") for each in STATISTICS)
    bias = Part(f"{path}.{name}.bias", 0, ("channels",), "carries", optional=True)
    return (Part(f"{path}.{name}.weight", 0, ("channels",)), bias, *norm)


def taken_by(path: str) -> Parts:
    return (Part(f"{path}.convolution.weight", 1, ("channels",), "reads"),)


def staged(model_type: str, row: Callable[[str], tuple[Sublayer, ...]]) -> Family:
    """A stack for each stage, whose layers stay. `row`: the sublayers, given the stage's name."""
    names = [f"stage{i + 1}" for i in range(STAGES)]
    stacks = tuple(Stack(n, f"encoder.stages.{i}.layers", layers(""), row(n)) for i, n in enumerate(names))
    return Family(model_type, stacks, tokens=None, maps=True)


def resnet_layer(stage: str) -> tuple[Sublayer, ...]:
    """Two convolutions, or three, with channels of the layer's own between them."""
    axis = (channels(f"{stage}_channels"),)
    first = Sublayer("convolution", axis, (*normed("layer.0"), *taken_by("layer.1")))
    second = Sublayer("second_convolution", axis, (*normed("layer.1"), *taken_by("layer.2")), optional=True)
    return first, second


def regnet_layer(stage: str) -> tuple[Sublayer, ...]:
    """The groups of the middle one of three convolutions, whole; in Y layers a gate for each channel reads them, too,
    and makes as many."""
    axis = channels(f"{stage}_groups", width="layer.1.convolution.weight", aligned=False)
    gate, own = "layer.2.attention", ("channels",)
    gated = (
        *taken_by("layer.3"),
        Part(f"{gate}.0.weight", 1, own, "reads"),
        Part(f"{gate}.2.weight", 0, own),
        Part(f"{gate}.2.bias", 0, own, "carries"),
    )
    made = (*normed("layer.0"), *normed("layer.1"))
    plain = Sublayer("convolution", (axis,), (*made, *taken_by("layer.2")), optional=True)
    return plain, Sublayer("convolution", (axis,), (*made, *gated), optional=True)


def mobilenet_v2() -> Family:
    """The channels that a layer expands to: each goes through a kernel of its own before the next one reads it."""
    made = (*normed("expand_1x1"), *normed("conv_3x3"))
    row = Sublayer("convolution", (channels("expanded_channels"),), (*made, *taken_by("reduce_1x1")))
    return Family("mobilenet_v2", (Stack("encoder", "layer", layers(""), (row,)),), tokens=None, maps=True)


def convnext_layer(stage: str) -> tuple[Sublayer, ...]:
    return (ffn(neurons(f"{stage}_neurons", "none"), ["pwconv1"], "pwconv2"),)


VISION = (
    staged("resnet", resnet_layer),
    staged("regnet", regnet_layer),
    staged("convnext", convnext_layer),
    mobilenet_v2(),
    *(narrowing(vit_like(name)) for name in ("vit", "deit")),
    *map(vit_like, ("vit_mae", "vit_msn", "ijepa", "audio-spectrogram-transformer")),
    vit_like("beit", distances("relative_position_bias")),
    *map(old_vit, ("yolos", "data2vec-vision")),
    *map(dinov2, ("dinov2", "dinov2_with_registers")),
    dinov3(),
    *map(clip_tower, ("clip_text_model", "clip_vision_model", "siglip_text_model", "siglip2_text_model")),
    clip_tower("siglip_vision_model", "none"),
    two_towers("clip"),
    *(two_towers(name, "none") for name in ("siglip", "siglip2")),
)
