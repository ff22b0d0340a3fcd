"""Pruned Llamas in vLLM's CPU build, token by token as likely as in transformers (make test-vllm)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_prune import PruningConfig, PruningPlan, describe, prune, save_pretrained
from hf_prune.export.decilm import to_decilm
from hf_prune.plan import Kept

ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SERVE = """
import json, sys
from vllm import LLM, SamplingParams

directory, given, prompts = json.loads(sys.argv[1])
plain = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 4}
engine = LLM(directory, skip_tokenizer_init=True, **plain, **given)
wanted = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False, logprobs=0, prompt_logprobs=0)
rows = []
for answer in engine.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False):
    ids = [*answer.prompt_token_ids, *answer.outputs[0].token_ids]
    found = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    rows.append([ids, [at[token].logprob for at, token in zip(found, ids[1:])]])
[name] = engine.apply_model(lambda model: type(model).__name__)
print(json.dumps([name, rows]))
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),
]
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


def served(directory, **given):
    """The class that vLLM built; the tokens of each prompt and answer; their log-probabilities."""
    arguments = json.dumps([str(directory), given, PROMPTS])
    # the process has vLLM to itself: its patches of transformers stay in it
    command, environment = [sys.executable, "-c", SERVE, arguments], {**os.environ, **ENGINE}
    found = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert found.returncode == 0, found.stderr.decode()[-2000:]
    return json.loads(found.stdout.decode().splitlines()[-1])


def check(model, directory, name, **given):
    """vLLM built this class, and each of its log-probabilities, of prompt and answer, is the model's."""
    built, rows = served(directory, **given)
    assert built == name
    for ids, found in rows:
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        ours = logs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (ours - torch.tensor(found)).abs().max() < 0.01  # they range over several units


def test_stock_shapes(tmp_path):
    model = pruned([(0, 2)] * 2, [384] * 2)
    save_pretrained(model, tmp_path / "m")
    check(model, tmp_path / "m", "LlamaForCausalLM")


@pytest.mark.parametrize("widths", [(384, 136), (512, 256)])
def test_widths_by_layer(tmp_path, widths):
    model = pruned([ALL] * 2, widths)
    to_decilm(model, tmp_path / "m")
    check(model, tmp_path / "m", "DeciLMForCausalLM", trust_remote_code=True)


def test_kv_heads_by_layer(tmp_path):
    model = pruned([(0, 1), (0, 2)], (384, 136))
    to_decilm(model, tmp_path / "m")
    check(model, tmp_path / "m", "DeciLMForCausalLM", trust_remote_code=True)


def test_widths_by_layer_in_the_code_of_transformers(tmp_path):
    """The plug-in of this package teaches it the sizes."""
    model = pruned([ALL] * 2, (384, 136))
    save_pretrained(model, tmp_path / "m")
    check(model, tmp_path / "m", "TransformersForCausalLM", model_impl="transformers")


def test_heads_by_layer_in_the_code_of_transformers(tmp_path):
    model = pruned([ALL, (0, 1)], (512, 512))
    save_pretrained(model, tmp_path / "m")
    check(model, tmp_path / "m", "TransformersForCausalLM", model_impl="transformers")
