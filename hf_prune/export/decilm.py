"""A Llama whose layers differ as DeciLM (`nemotron-nas`), which vLLM and SGLang build from a list of layers.

The weights keep their names. config.json lists for each layer its query heads to a KV head and its FFN width; one small
file beside it makes the objects that those engines read out of that list, so they are started with trust_remote_code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.directory import beside, refuse_full
from ..checkpoint.layout import KEY
from ..files import read_json
from ..model.anatomy import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral")
MODEL_TYPE, CLASS = "nemotron-nas", "DeciLMForCausalLM"
OURS = (KEY, "per_layer_config", "allow_global_per_layer_attribute_access")  # of the config before
CODE_FILE = "configuration_decilm.py"
STEP = 256  # FFN widths that `ffn_mult` can say are multiples of it; vLLM alone reads the width itself
CODE = '''"""Written by hf_prune: the config of a Llama whose layers differ, as the engines that know DeciLM read it."""

from transformers import PreTrainedConfig


class Entry(dict):
    """A part of the list of layers; its keys are attributes too."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        value = self[name]
        return Entry(value) if isinstance(value, dict) else value


class DeciLMConfig(PreTrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        self.block_configs = [Entry(block) for block in block_configs]
        super().__init__(**kwargs)
'''


def to_decilm(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    processing_class: Any = None,
    *,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write config.json, the file that reads it, and the weights; transformers itself has no code for the result.

    Args:
        processing_class: tokenizer, saved alongside.
        overwrite: replace a directory that is not empty.

    Returns:
        The engines that can say these sizes: SGLang reads FFN widths in multiples of 256 alone.

    Raises:
        ValueError: another family, layers with different numbers of query heads, or a sliding window. FileExistsError:
            the directory is not empty.
    """
    target = refuse_full(directory, overwrite)
    said = config_of(model)
    with beside(target) as temporary:
        model.save_pretrained(temporary)
        _rewrite(temporary, said)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)
    exact = all("ffn_mult" in block["ffn"] for block in said["block_configs"]) and not getattr(
        model.config, "mlp_bias", False
    )
    return ("vLLM", "SGLang") if exact else ("vLLM",)


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of a DeciLM and not of a Llama, or otherwise.

    Raises:
        ValueError: DeciLM cannot say it.
    """
    _check(model)
    config, sites = model.config, sorted(describe(model).sites, key=lambda site: site.layer)
    attention = [site for site in sites if site.kind == "attention"]
    widths = [site.columns for site in sites if site.kind == "ffn"]
    groups = [site.sizes["kv_groups"] for site in attention]
    heads = _one_number([site.sizes["heads"] for site in attention])
    return {
        "model_type": MODEL_TYPE,
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": f"{Path(CODE_FILE).stem}.DeciLMConfig"},
        "block_configs": [_block(heads // count, width, config) for count, width in zip(groups, widths, strict=True)],
        "num_attention_heads": heads,
        "num_key_value_heads": max(groups),
        "intermediate_size": max(widths),
        "head_dim": attention[0].widths["heads"],
        "rope_theta": config.rope_parameters["rope_theta"],  # where SGLang looks for it
    }


def _one_number(heads: Sequence[int]) -> int:
    counts = sorted({*heads})
    if len(counts) > 1:
        raise ValueError(
            f"DeciLM has one number of query heads for all layers, and these have {', '.join(map(str, counts))}. Prune "
            "neurons alone by layer (units=['neurons']), or export to GGUF or ONNX."
        )
    return counts[0]


def _check(model: PreTrainedModel) -> None:
    config: Any = model.config
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise ValueError(
            f"DeciLM: a {type(model).__name__} is not written; language models of {', '.join(FAMILIES)} are. In other "
            "families vLLM and SGLang take stock shapes."
        )
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise ValueError(
            f"DeciLM reads all tokens, and this {config.model_type} the last {window} (sliding_window). Set "
            f"max_position_embeddings to {window} if that is long enough, or export to ONNX."
        )


def _block(heads_in_group: int, width: int, config: Any) -> dict[str, Any]:
    plain = {"no_op": False, "replace_with_linear": False}
    ffn = {**plain, "intermediate_size": width, "hidden_act": config.hidden_act}
    if width % STEP == 0:
        ffn["ffn_mult"] = multiplier(width, config.hidden_size)
    return {"attention": {**plain, "n_heads_in_group": heads_in_group}, "ffn": ffn}


def multiplier(width: int, hidden: int) -> float:
    """The `ffn_mult` that is read as this width: the engines take int(2 · ffn_mult · hidden / 3), and round that up.

    Args:
        width: a multiple of 256.
    """
    return round(3 * (width - STEP // 2) / (2 * hidden), 6)  # from the middle of a step no rounding leads out of it


def _rewrite(directory: Path, said: Mapping[str, Any]) -> None:
    """config.json of the pruned Llama -> that of a DeciLM, and the file that reads it."""
    path = directory / "config.json"
    config = {key: value for key, value in read_json(path).items() if key not in OURS}
    path.write_text(json.dumps({**config, **said}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (directory / CODE_FILE).write_text(CODE, encoding="utf-8")
