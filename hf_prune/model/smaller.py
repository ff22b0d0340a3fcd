"""Small versions of a config of any model type.

Only the tables below know names of config keys, and only to make things small: a key that they do not know keeps its
value. What a key sizes is for others to find out, so sizes differ from one another.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NARROW = {"hidden": 96, "ffn": 80, "heads": 6, "kv": 3, "head_dim": 16, "ssm_heads": 12, "ratio": 1}
WIDER = {"hidden": 128, "ffn": 160, "heads": 4, "kv": 2, "head_dim": 32, "ssm_heads": 8, "ratio": 1}
SIZES: tuple[dict[str, int], ...] = (  # the last two keep the proportions of widths, and widths as they are
    {**NARROW, "image": 16, "patch": 4},
    NARROW,
    {**WIDER, "image": 32, "patch": 4},
    {**WIDER, "kv": 4},
    {**NARROW, "wanted": 1},
    {"shrink": 8, "ratio": 1},
    {},
)
SWAPS = {  # what a key says about others: latent attention has no groups, Mamba-2 the heads that its inner width needs
    "kv_lora_rank": ("kv", "heads"),
    "expand": ("heads", "ssm_heads"),
}
BOUNDS: tuple[tuple[str, float | str], ...] = (  # the first pattern that matches a key; a name is looked up in SIZES
    (r"^type_vocab_size$", 3),
    (r"vocab_size", 128),
    (r"^linear_num_value_heads$", 4),
    (r"^(linear_num_key_heads|.*mamba_n_groups|n_groups|ssm_n_groups)$", 2),
    (r"(key_value_heads|head_kv|kv_heads|query_group_num)$", "kv"),
    (r"^(mamba_(n|num)_heads|n_mamba_heads)$", "ssm_heads"),
    (r"^(index_n_heads|index_topk)$", 4),
    (r"((^|_)n_heads?|attention_heads|num_heads)$", "heads"),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank)$", 24),
    (r"(head_dim|d_kv|attention_head_size|kv_channels|query_pre_attn_scalar|d_head|dim_head)$", "head_dim"),
    (r"(intermediate_size.*|ffn_dim|d_ff|n_inner|mlp_dim|dim_feedforward|ffn_hidden_size|d_inner|linear_units|"
     r"channels_mlp_dim|tokens_mlp_dim)$", "ffn"),
    (r"^((.*_)?hidden_size|hidden_dim|d_model|n_embd|dim|embed_dim|model_dim|word_embed_proj_dim|projection_dim"
     r"|(en|de)coder_(embed|hidden)_dim|.*width|emb_dim|output_dim|output_channels|embedding_size)$", "hidden"),
    (r"^(hidden_size|embed_dim|vocab_size)_per_layer_input$", 24),
    (r"^((moe_)?num_(local_|routed_)?experts|n_routed_experts)$", 6),
    (r"^(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|num_selected_experts)$", 2),
    (r"^(n_group|topk_group|num_expert_group|.*shared_experts)$", 1),
    (r"^(first_k_dense_replace|num_nextn_.*|mtp_num.*|num_mtp.*|num_dense_layers|moe_layer_start_index)$", 1),
    (r"^num_kv_shared_layers$", 0),
    (r"^attn_layer_period$", 4),
    (r"^(attn_layer_offset|.*_interval|expert_layer_period)$", 2),
    (r"^expert_layer_offset$", 1),
    (r"(position_embeddings|n_positions|_positions|max_seq_len|n_ctx|max_sequence_length|max_seq_length)$", 64),
    (r"^num_queries$", 12),
    (r"^(num|n)_filters$", 8),
    (r"(tokens_per_image|image_tokens)$", 4),
    (r"^width_coefficient$", "ratio"),
    (r"^depth_coefficient$", 1),
    (r"^(context_size|attention_window)$", 8),
    (r"^(image|input|img|pretrain_image)_size$", "image"),
    (r"^patch_size$", "patch"),
)  # fmt: skip
LAYERS = r"(^|_)(n_layers?|num_layers|layers|depth|num_blocks|num_hidden_layers|block_count)$"
NO_LAYERS = r"feat_extract|adapter|cnn|conv|min_|mult|shared|nextn|mtp|dense_l|moe_l|only|lstm|head_depth"
PERIODS = r"(period|interval|frequency|sparse_step)$"
INDICES = r"(index(es)?|indices|attn_idx|only_layers|feature_layers?)$"
WIDTHS = r"(hidden_sizes|embed_dims?|dims|conv_dim|tdnn_dim|widths?)$"
SHRINKS = r"(dim|size|channels|width|features|rank|groups|filters|d_model|d_ff|n_embd|n_inner|d_kv)s?$"
STAYS = r"image|patch|kernel|window|vocab|codebook_size|merge|chunk|input_size|tubelet|num_features"
TOKENS = r"token_(id|index)$|^(pad|bos|eos|unk|mask|cls|sep)_(index|id)$"
LEFT_OUT = (
    "id2label", "label2id", "stage_names", "out_indices", "out_features", "transformers_version", "dtype",
    "quantization_config", "ignore_keys_at_rope_validation",
)  # fmt: skip
WANTED = {  # keys that a class gives no value but needs
    "prediction_length": 8, "num_experts_per_tok": 2, "vocab_size": 128, "head_dim": 16, "top_k_experts": 2,
    "num_key_value_heads": 6,
}  # fmt: skip
WANTED_AT_LAST = {  # where nothing else builds: no value may mean that there is no such thing
    "n_routed_experts": 6, "num_experts": 6, "n_shared_experts": 1, "moe_intermediate_size": 80, "pad_token_id": 0,
}  # fmt: skip
STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {  # for sub-models of packages that are not installed
    "timm_backbone": ("resnet", {"embedding_size": 8, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}),
}


def small_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Small versions of a config, best first: every flag and every kind of layer stays, there is less of everything."""
    for small, _ in candidates(config):
        if small is not None:
            yield small


def candidates(config: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig | None, str]]:
    """Each small config, or None and the reason that its class gives for refusing it."""
    for sizes in SIZES:
        try:
            yield _smaller(copy.deepcopy(config), sizes), ""  # a class may write into the sub-configs that it is given
        except Exception as error:  # a class may refuse a combination with any error
            yield None, reason_of(error)


def _smaller(config: PreTrainedConfig, sizes: dict[str, int]) -> PreTrainedConfig:
    values = {key: value for key, value in vars(config).items() if not key.startswith("_") and key not in LEFT_OUT}
    wanted = WANTED if "wanted" not in sizes else WANTED | WANTED_AT_LAST
    values |= {key: value for key, value in wanted.items() if values.get(key, 0) is None}
    for key, (size, other) in SWAPS.items():
        if key in values and sizes:
            sizes = {**sizes, size: sizes[other]}
    small = {key: _small(key, value, sizes) for key, value in values.items()}
    stages = len(vars(config).get("_out_indices") or ())
    small |= (changed := _fewer_layers(small, stages))
    rotary = _rotary(values, small, bool(sizes) and _multimodal(inspect.getfile(type(config))))
    small |= rotary
    changed |= {key: value for key, value in rotary.items() if value != values[key]}
    derived = _derived(type(config), values) - {*changed}
    again = type(config)(**{key: value for key, value in small.items() if key not in derived})
    stuck = {key for key in derived if vars(again).get(key) == values[key] != small[key]}
    if not stuck:
        return again
    return type(config)(**{key: value for key, value in small.items() if key not in derived - stuck})


def _derived(config_class: type, values: dict[str, Any]) -> set[str]:
    """Keys that the class works out from others: left out, they come back as they were."""
    optional = {
        key for key, value in values.items()
        if not (value is None or hasattr(value, "sub_configs") or _bound(key) == "kv")
        and getattr(config_class, key, None) is None
    }  # fmt: skip
    try:
        again = config_class(**{key: value for key, value in values.items() if key not in optional})
    except Exception:  # then nothing can be left out
        return set()
    return {key for key in optional if vars(again).get(key) == values[key]}


@cache
def _bound(key: str) -> float | str | None:
    return next((bound for pattern, bound in BOUNDS if re.search(pattern, key)), None)


def _small(key: str, value: Any, sizes: dict[str, int]) -> Any:
    """A smaller value of one key; sub-configs are made small in turn."""
    if hasattr(value, "sub_configs"):
        return _stand_in(value) or _smaller(value, sizes)
    if isinstance(value, list | tuple):
        if "hidden" in sizes and re.search(WIDTHS, key) and {type(part) for part in value} == {int}:
            return [max(1, width * 8 // max(min(value), 8)) for width in value]
        return [_small(key, part, sizes) for part in value]
    if type(value) not in (int, float):
        return value
    if re.search(TOKENS, key) and type(value) is int:
        return value if value < 20 else 8 + sum(map(ord, key)) % 16  # below the ids of a feed
    if "shrink" in sizes and re.search(SHRINKS, key) and not re.search(STAYS, key):
        return value // sizes["shrink"] if type(value) is int and value >= 64 else value
    bound = _bound(key)
    most = sizes.get(bound) if isinstance(bound, str) else bound
    return value if most is None else type(value)(min(value, most))


def _stand_in(config: PreTrainedConfig) -> PreTrainedConfig | None:
    from transformers import CONFIG_MAPPING
    from transformers.utils import is_timm_available

    if config.model_type not in STAND_INS or is_timm_available():
        return None
    model_type, values = STAND_INS[config.model_type]
    make: Any = CONFIG_MAPPING[model_type]
    return make(**values, out_indices=vars(config).get("_out_indices"))


def _fewer_layers(values: dict[str, Any], stages: int = 1) -> dict[str, Any]:
    """Layer counts of 3 to 6, lists along the layers with each kind of layer, and indices of layers that are there."""
    counts = {
        key: value for key, value in values.items()
        if type(value) is int and re.search(LAYERS, key) and not re.search(NO_LAYERS, key)
    }  # fmt: skip
    least = max(4 if any(re.search(PERIODS, key) for key in values) else 3, stages)
    found: dict[str, Any] = {key: min(value, least) for key, value in counts.items()}
    for count in set(counts.values()):
        along = [key for key, value in values.items() if isinstance(value, list) and len(value) == count > least]
        chosen = _each_kind(list(zip(*(values[key] for key in along), strict=True)), least)
        found |= {key: [values[key][index] for index in chosen] for key in along}
        found |= {key: len(chosen) for key, value in counts.items() if value == count and along}
    last = min((found[key] for key in counts), default=3) - 1
    if stages > 1:
        top = len(values.get("depths") or ()) or max((found[key] for key in counts), default=3)
        found["out_indices"] = [*range(top - stages + 1, top + 1)]
    for key, value in values.items():
        if re.search(INDICES, key) and isinstance(value, list) and all(type(index) is int for index in value):
            found[key] = sorted({max(min(index, last), -last - 1) for index in value})
        if key == "depths" and isinstance(value, list):
            found[key] = [min(depth, 2) for depth in value]
    return found


def _each_kind(rows: list[tuple[Any, ...]], least: int) -> list[int]:
    """Indices of two layers of each kind (some share weights with the first), of six in all, and at least some."""
    kinds: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        kinds.setdefault(repr(row), []).append(index)
    order = sorted(range(len(rows)), key=lambda index: kinds[repr(rows[index])].index(index))
    return sorted(order[: max(least, min(2 * len(kinds), 6))])


def _rotary(values: dict[str, Any], small: dict[str, Any], multimodal: bool) -> dict[str, Any]:
    """Rotary parameters with lists as long as the new heads are wide."""

    def width(of: dict[str, Any]) -> int:
        wide = of.get("qk_rope_head_dim") or of.get("head_dim")
        return wide or of.get("hidden_size", 1) // of.get("num_attention_heads", 1)

    def fit(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            half = int(width(small) * (value.get("partial_rotary_factor") or 1)) // 2
            turned = multimodal and value.keys() & {"rope_theta", "rope_type"}
            added = {"mrope_section": _thirds(half)} if turned else {}
            return added | {name: fit(name, part) for name, part in value.items()}
        if not isinstance(value, list):
            return value
        count = len(value) * width(small) // width(values)
        return _thirds(round(sum(value) * width(small) / width(values))) if key == "mrope_section" else value[:count]

    mine = {key: value for key, value in small.items() if re.match("rope_|mrope_section", key)}
    return {key: fit(key, value) for key, value in mine.items() if isinstance(value, dict | list)}


def _thirds(total: int) -> list[int]:
    return [total - 2 * (total // 3), total // 3, total // 3]


@cache
def _multimodal(file: str) -> bool:
    """Does the model whose config class a file holds turn three axes, even where the config does not say how many?"""
    path = Path(file.replace("configuration_", "modeling_"))
    return path.exists() and "mrope_section" in path.read_text()


def reason_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
