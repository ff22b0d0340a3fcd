"""Models of pictures, and of pictures beside text."""

from __future__ import annotations

from ..axes import Count, Family, Part, Parts, Stock, Sublayer
from .encoders import bert_ffn, encoder
from .words import QKV_OUT, attention, ffn, heads, narrowing, neurons, tower


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


VISION = (
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
