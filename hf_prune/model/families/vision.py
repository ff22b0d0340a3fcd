"""Models of pictures."""

from __future__ import annotations

from ..axes import Count, Family
from .encoders import encoder
from .words import attention, ffn, heads


def vit_like(model_type: str, path: str = "layers") -> Family:
    itself = attention(
        "attention",
        heads("num_attention_heads", "attention.head_dim", "any"),
        counts=(Count("attention.num_attention_heads", "heads"),),
    )
    return encoder(model_type, path, itself, ffn("intermediate_size", ["mlp.fc1"], "mlp.fc2"))


VISION = (*map(vit_like, ("vit", "deit", "vit_mae", "vit_msn", "ijepa")),)
