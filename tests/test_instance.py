"""Small instances of model types that no family row knows."""

from __future__ import annotations

import pytest
import torch
import transformers

from hf_prune.model.feed import feeds, observed
from hf_prune.model.instance import classes_of, instance, small_configs

TYPES = (
    "bert", "gpt2", "qwen3_moe", "deepseek_v3", "mamba2", "jamba", "t5", "whisper", "wav2vec2", "vit", "resnet", "clip",
    "qwen3_vl",
)  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_small_instance_runs(model_type):
    model = instance(model_type)
    assert type(model).__name__ in classes_of(model_type)[:3]
    assert not model.training
    assert model.dtype == torch.float64
    assert sum(weight.numel() for weight in model.parameters()) < 5e6
    calls = feeds(model)
    first, again = observed(model, calls), observed(model, calls)
    assert first
    for one, other in zip(first, again, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_towers_that_forward_does_not_reach_have_feeds_of_their_own():
    assert [feed.method for feed in feeds(instance("qwen3_vl"))] == ["forward", "get_image_features"]


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "gemma3_text", "modernbert"])
def test_every_kind_of_layer_of_a_hybrid_stays(model_type):
    config = transformers.CONFIG_MAPPING[model_type]()
    small = next(small_configs(config))
    assert set(small.layer_types) == set(config.layer_types)
    assert 3 <= small.num_hidden_layers == len(small.layer_types) <= 6


def test_a_config_of_ones_own_becomes_small():
    config = transformers.Qwen3Config(
        num_hidden_layers=64, hidden_size=5120, intermediate_size=25600, num_attention_heads=64, vocab_size=151936,
        attention_bias=True, eos_token_id=151645, architectures=["Qwen3ForCausalLM"],
    )  # fmt: skip
    small = next(small_configs(config))
    assert (small.num_hidden_layers, small.hidden_size, small.intermediate_size, small.vocab_size) == (3, 96, 80, 128)
    assert (small.num_attention_heads, small.num_key_value_heads, small.head_dim) == (6, 3, 16)
    assert small.attention_bias
    assert small.eos_token_id < 24
    assert config.num_hidden_layers == 64
    assert instance(config).config.to_dict().items() >= {"hidden_size": 96, "attention_bias": True}.items()


def test_what_cannot_be_built_says_why():
    config = transformers.BertConfig(hidden_act="no such function")
    with pytest.raises(ValueError, match=r"No small instance of 'bert' runs:\nBert\w+, size 0: KeyError: .*no such"):
        instance(config)
