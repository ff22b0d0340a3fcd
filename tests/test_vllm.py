"""Pruned Llamas in vLLM's CPU build, which give the greedy tokens that transformers gives (make test-vllm)."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune import PruningConfig, PruningPlan, describe, prune, save_pretrained
from hf_prune.export.decilm import to_decilm
from hf_prune.plan import Kept

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PROMPTS = [[5, 6, 7, 8, 9], [40, 3, 77], [11] * 12]
ALL = tuple(range(4))


def pruned(heads, widths):
    """A random Llama of two layers, of which these query heads and so many neurons stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=2, head_dim=32, max_position_embeddings=128, **sizes)
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
    kept = [
        Kept(site.key, site.inner.name, site.sizes[site.inner.name], units)
        for site in describe(model).sites
        for units in [heads[site.layer] if site.kind == "attention" else tuple(range(widths[site.layer]))]
    ]
    plan, data = PruningPlan("llama", kept), [{"input_ids": torch.randint(128, (8, 8))}]
    prune(model, data, PruningConfig(repair="none"), plan=plan)
    return model.eval()


def expected(model):
    given = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    return [model.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist() for ids in PROMPTS]


def served(directory, **given):
    """The class that vLLM built, and its tokens."""
    from vllm import LLM, SamplingParams

    plain = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4}
    engine = LLM(str(directory), skip_tokenizer_init=True, **plain, **given)
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)
    [name] = engine.apply_model(lambda model: type(model).__name__)
    return name, [list(answer.outputs[0].token_ids) for answer in answers]


def test_stock_shapes(tmp_path):
    model = pruned([(0, 2)] * 2, [384] * 2)
    save_pretrained(model, tmp_path / "m")
    assert served(tmp_path / "m") == ("LlamaForCausalLM", expected(model))


@pytest.mark.parametrize("widths", [(384, 136), (512, 256)])
def test_widths_by_layer(tmp_path, widths):
    model = pruned([ALL] * 2, widths)
    to_decilm(model, tmp_path / "m")
    assert served(tmp_path / "m", trust_remote_code=True) == ("DeciLMForCausalLM", expected(model))


def test_kv_heads_by_layer(tmp_path):
    model = pruned([(0, 1), (0, 2)], (384, 136))
    to_decilm(model, tmp_path / "m")
    assert served(tmp_path / "m", trust_remote_code=True) == ("DeciLMForCausalLM", expected(model))


def test_widths_by_layer_in_the_code_of_transformers(tmp_path):
    """The plug-in of this package teaches it the sizes."""
    model = pruned([ALL] * 2, (384, 136))
    save_pretrained(model, tmp_path / "m")
    assert served(tmp_path / "m", model_impl="transformers") == ("TransformersForCausalLM", expected(model))


def test_heads_by_layer_in_the_code_of_transformers(tmp_path):
    model = pruned([ALL, (0, 1)], (512, 512))
    save_pretrained(model, tmp_path / "m")
    assert served(tmp_path / "m", model_impl="transformers") == ("TransformersForCausalLM", expected(model))
