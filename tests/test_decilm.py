"""DeciLM directories, read back as vLLM builds them: one Llama layer for each entry of block_configs."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import cut, tiny_batch, tiny_model
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_prune import PruningConfig, PruningPlan, describe, prune
from hf_prune.export.decilm import STEP, config_of, multiplier, to_decilm
from hf_prune.plan import Kept

SHARED = ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim", "rms_norm_eps")
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")


def llama(family="llama", **sizes):
    if not sizes:
        return tiny_model(family, {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[family]).eval()
    config = {"vocab_size": 99, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **{**config, **sizes})).eval()


def by_layer(model, heads, widths):
    """Keep these query heads, and the first so many neurons, of each layer."""
    places = [(site, (heads if site.kind == "attention" else widths)[site.layer]) for site in describe(model).sites]
    kept = [
        Kept(site.key, site.inner.name, site.sizes[site.inner.name], tuple(range(n)) if isinstance(n, int) else n)
        for site, n in places
    ]
    return cut(model, PruningPlan(model.config.model_type, tuple(kept))).eval()


def layer_width(ffn, hidden):
    """As vLLM reads it: SGLang has the first branch alone."""
    if hasattr(ffn, "ffn_mult"):
        found = int(2 * ffn.ffn_mult * hidden / 3)
        return found if found % 256 == 0 else found + 256 - found % 256
    return ffn.intermediate_size


def read(directory):
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    given = {key: getattr(config, key) for key in SHARED}
    given |= {"rope_parameters": config.rope_parameters, "tie_word_embeddings": config.tie_word_embeddings}
    plain = LlamaConfig(**given, num_key_value_heads=config.num_attention_heads, attn_implementation="eager")
    model = LlamaForCausalLM(plain)
    for layer, block in enumerate(config.block_configs):
        plain.num_key_value_heads = config.num_attention_heads // block.attention.n_heads_in_group
        plain.intermediate_size, plain.hidden_act = layer_width(block.ffn, config.hidden_size), block.ffn.hidden_act
        model.model.layers[layer] = LlamaDecoderLayer(plain, layer)
    missing = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return config, model.eval()


def same(model, directory):
    config, again = read(directory)
    ids = torch.arange(8, 24).reshape(2, 8)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, again(ids).logits, atol=1e-5)
    return config


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_widths_by_layer(tmp_path, family):
    model = llama(family)
    given = {"keep": 0.6, "align": 4, "units": ["neurons"], "shapes": "per_layer", "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(calibration_samples=64, **given))
    assert to_decilm(model.eval(), tmp_path / "deci") == ("vLLM",)
    config = same(model, tmp_path / "deci")
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    written = json.loads((tmp_path / "deci" / "config.json").read_text())
    assert not {"hf_prune", "per_layer_config"} & {*written}


def test_widths_that_every_engine_can_say(tmp_path):
    model = by_layer(llama(intermediate_size=1024), [(0, 1, 2, 3)] * 2, [768, 256])
    assert to_decilm(model, tmp_path / "deci") == ("vLLM", "SGLang")
    assert all("ffn_mult" in block.ffn for block in same(model, tmp_path / "deci").block_configs)


def test_kv_heads_by_layer(tmp_path):
    """Two query heads in each: of one KV head, and of one each."""
    model = by_layer(llama(intermediate_size=64, tie_word_embeddings=True), [(0, 1), (0, 2)], [24, 64])
    to_decilm(model, tmp_path / "deci")
    assert [block.attention.n_heads_in_group for block in same(model, tmp_path / "deci").block_configs] == [2, 1]


@pytest.mark.parametrize("hidden", [64, 576, 1000, 4096, 8192, 16384])
def test_a_multiplier_is_read_as_its_width(hidden):
    for width in range(STEP, 8 * hidden, STEP):
        found = int(2 * multiplier(width, hidden) * hidden / 3)
        assert found + -found % STEP == width


def test_the_config_is_saved_and_read_again(tmp_path):
    to_decilm(llama(intermediate_size=64), tmp_path / "deci")
    config = AutoConfig.from_pretrained(tmp_path / "deci", trust_remote_code=True)
    again = type(config).from_dict(json.loads(config.to_json_string()))
    assert again.block_configs[1].ffn.intermediate_size == 64
    assert not hasattr(again.block_configs[1].ffn, "ffn_mult")


def test_what_cannot_be_said_is_refused_before_anything_is_written(tmp_path):
    for model, problem in (
        (by_layer(llama(intermediate_size=64), [(0, 1), (0, 1, 2, 3)], [64, 64]), "one number of query heads"),
        (tiny_model("qwen2", "Qwen2ForCausalLM"), "a Qwen2ForCausalLM is not written; language models of llama"),
        (tiny_model("llama", "LlamaForSequenceClassification"), "a LlamaForSequenceClassification is not written"),
    ):
        with pytest.raises(ValueError, match=problem):
            to_decilm(model, tmp_path / "deci")
    windowed = llama("mistral")
    windowed.config.sliding_window = 4
    with pytest.raises(ValueError, match=r"reads all tokens, and this mistral the last 4 \(sliding_window\)"):
        config_of(windowed)
    (tmp_path / "mine").write_text("here")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        to_decilm(llama(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
