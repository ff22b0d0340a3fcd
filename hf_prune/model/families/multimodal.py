"""Language models that read pictures, too: the stacks of known rows as towers.

A vision tower is left whole where it runs all pictures of a batch as one long list of patches: there no row belongs to
an example, as scores and repairs need it (Qwen's, Pixtral's).
"""

from __future__ import annotations

from ..axes import Count, Family, Stack, Stock
from .decoders import DECODERS, llama_like
from .encoders import encoder
from .vision import clip_tower
from .words import attention, ffn, heads, tower


def text_tower(row: Family, path: str = "language_model") -> Stack:
    return tower(row, "text", path, "text_config")


def vision_tower(row: Family, path: str = "vision_tower") -> Stack:
    return tower(row, "vision", path, "vision_config")


def reader(model_type: str, *stacks: Stack, offset: float = 0.0) -> Family:
    """Stacks in the order in which they run."""
    return Family(model_type, stacks, norm_offset=offset)


def known(model_type: str) -> Family:
    return next(row for row in DECODERS if row.model_type == model_type)


def intern_vit() -> Family:
    names = ("q_proj", "k_proj", "v_proj", "projection_layer")
    counts = (Count("attention.num_heads", "heads"), Count("attention.embed_dim", "heads", "columns"))
    itself = attention("attention", heads("num_attention_heads", "attention.head_dim"), names, counts)
    return encoder("", "encoder.layer", itself, ffn("intermediate_size", ["mlp.fc1"], "mlp.fc2"))


def smol(model_type: str) -> Family:
    vision = vision_tower(clip_tower(""), "vision_model")
    return reader(model_type, vision, text_tower(known("llama"), "text_model"))


def qwen_text(model_type: str, stock: Stock) -> Family:
    return reader(model_type, text_tower(llama_like("", stock)))


MULTIMODAL = (
    reader("llava", vision_tower(clip_tower("")), text_tower(known("llama"))),
    reader("internvl", vision_tower(intern_vit()), text_tower(known("qwen2"))),
    # the vision tower has a pooling head, sized by the same key
    reader("gemma3", vision_tower(clip_tower("", "none")), text_tower(known("gemma3_text")), offset=1.0),
    reader("paligemma", vision_tower(clip_tower("")), text_tower(known("gemma")), offset=1.0),
    *map(smol, ("smolvlm", "idefics3")),
    reader("mistral3", text_tower(known("mistral"))),
    *(qwen_text(name, "none") for name in ("qwen2_vl", "qwen2_5_vl")),
    qwen_text("qwen3_vl", "any"),
    *(reader(name, text_tower(known(f"{name}_text"))) for name in ("qwen3_5", "qwen3_5_moe")),
)
