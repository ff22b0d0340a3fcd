"""Text encoders."""

from __future__ import annotations

from ..axes import Count, Family, NormPlace, Part, Stack, Sublayer, made_by
from .words import attention, ffn, fused_attention, grouped_heads, heads, layers, narrowing

SELF = ("self.query", "self.key", "self.value", "output.dense")
SELF_COUNTS = (
    Count("attention.self.num_attention_heads", "heads"),
    Count("attention.self.all_head_size", "heads", "columns"),
)


def encoder(model_type: str, path: str, *sublayers: Sublayer, depth: str = "num_hidden_layers") -> Family:
    return Family(model_type, (Stack("encoder", path, layers(depth), sublayers),))


def bert_ffn(norm_place: NormPlace = "after") -> Sublayer:
    norm = "output.LayerNorm" if norm_place else ""
    return ffn("intermediate_size", ["intermediate.dense"], "output.dense", norm=norm, norm_place=norm_place)


def bert_like(model_type: str, norm_place: NormPlace = "after") -> Family:
    itself = attention(
        "attention",
        heads("num_attention_heads", "attention.self.attention_head_size"),
        SELF,
        SELF_COUNTS,
        norm="attention.output.LayerNorm" if norm_place else "",
        norm_place=norm_place,
    )
    return encoder(model_type, "encoder.layer", itself, bert_ffn(norm_place))


def distilbert() -> Family:
    itself = attention(
        "attention",
        heads("n_heads", "attention.attention_head_size"),
        ("q_lin", "k_lin", "v_lin", "out_lin"),
        (Count("attention.n_heads", "heads"),),
        norm="sa_layer_norm",
        norm_place="after",
    )
    neurons = ffn("hidden_dim", ["ffn.lin1"], "ffn.lin2", norm="output_layer_norm", norm_place="after")
    return encoder("distilbert", "transformer.layer", itself, neurons, depth="n_layers")


def deberta_v2() -> Family:
    """Its matrices for relative positions, where it has them, make heads like those for tokens."""
    at = "attention.self"
    positions = (part for name in ("pos_key_proj", "pos_query_proj") for part in made_by(f"{at}.{name}", "heads"))
    itself = attention(
        "attention",
        heads("num_attention_heads", "attention.self.attention_head_size"),
        ("self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        SELF_COUNTS,
        more=tuple(Part(part.tensor, part.dim, part.axes, "carries", optional=True) for part in positions),
        norm="attention.output.LayerNorm",
        norm_place="after",
    )
    return encoder("deberta-v2", "encoder.layer", itself, bert_ffn())


def deberta() -> Family:
    at = "attention.self"
    positions = (part for name in ("pos_proj", "pos_q_proj") for part in made_by(f"{at}.{name}", "heads"))
    carried = (Part(f"{at}.{name}", 0, ("heads",), "carries") for name in ("q_bias", "v_bias"))
    itself = fused_attention(
        heads("num_attention_heads", f"{at}.attention_head_size"),
        f"{at}.in_proj",
        "attention.output.dense",
        SELF_COUNTS,
        interleaved=True,
        more=(*carried, *(Part(part.tensor, part.dim, part.axes, "carries", optional=True) for part in positions)),
        norm="attention.output.LayerNorm",
        norm_place="after",
    )
    return encoder("deberta", "encoder.layer", itself, bert_ffn())


def mpnet() -> Family:
    """Without heads: one table of position biases, outside the layers, has a column for each."""
    return encoder("mpnet", "encoder.layer", bert_ffn())


def modernbert(model_type: str) -> Family:
    """The first layer always stays: it alone has no norm before its attention."""
    itself = fused_attention(heads("num_attention_heads", "attn.head_dim"), "attn.Wqkv", "attn.Wo", ())
    neurons = ffn("intermediate_size", ["mlp.Wi"], "mlp.Wo", fused=True)
    return Family(model_type, (Stack("encoder", "layers", layers("num_hidden_layers", (0,)), (itself, neurons)),))


def nomic_bert(model_type: str) -> Family:
    """Llama's names, norms behind the sums."""
    itself = attention(
        "self_attn",
        heads("num_attention_heads", "self_attn.head_dim", "any"),
        norm="post_attention_layernorm",
        norm_place="after",
    )
    up = ["mlp.gate_proj", "mlp.up_proj"]
    neurons = ffn("intermediate_size", up, "mlp.down_proj", norm="post_mlp_layernorm", norm_place="after")
    return encoder(model_type, "layers", itself, neurons)


def eurobert() -> Family:
    axes = grouped_heads("num_attention_heads", "num_key_value_heads", "self_attn.head_dim", "divisors")
    itself = attention("self_attn", axes, counts=(Count("self_attn.num_key_value_groups", "heads", "each"),))
    up = ["mlp.gate_proj", "mlp.up_proj"]
    return encoder("eurobert", "layers", itself, ffn("intermediate_size", up, "mlp.down_proj"))


ENCODERS = (
    *(narrowing(bert_like(name)) for name in ("bert", "roberta", "xlm-roberta", "camembert", "ernie")),
    narrowing(bert_like("electra"), "hidden_size", "embedding_size"),
    bert_like("data2vec-text"),
    *map(bert_like, ("bert-generation", "layoutlm", "rembert", "roc_bert", "roformer", "splinter", "markuplm")),
    *(bert_like(name, "") for name in ("xlm-roberta-xl", "roberta-prelayernorm", "megatron-bert")),
    distilbert(),
    deberta_v2(),
    deberta(),
    mpnet(),
    modernbert("modernbert"),
    nomic_bert("nomic_bert"),
    eurobert(),
)
