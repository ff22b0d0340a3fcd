"""What the CPU suite shows, on a GPU: the same cut and repair, no tensor left behind, training, and a real clock.

`make test-gpu`; nothing here runs without a CUDA device.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_tokens import model_for
from test_vocabulary import USED, bert, sentences
from tiny import CLASSES, cut_everywhere, distance, outputs, tiny, tiny_batch, within_reach
from training import trainer

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.model.mask import masked
from hf_prune.score.criteria import CRITERIA

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*calibration tokens to refit"),
]
FIRST = [names[0] for names in CLASSES.values()]


def on_gpu(batch):
    return {key: value.cuda() for key, value in batch.items()}


@pytest.fixture(autouse=True)
def whole_fp32(monkeypatch):
    """cuDNN rounds the patches' convolution to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def everything_on_gpu(model):
    return all(tensor.is_cuda for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("tied", [False, True])
def test_spread_over_gpu_memory_and_disk(tied, tmp_path):
    """The same as on the GPU alone, and the weights lie where they lay."""
    whole = tiny("LlamaForCausalLM", tie_word_embeddings=tied, num_hidden_layers=3).cuda()
    ends = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), 0)
    layers = {"model.layers.0": 0, "model.layers.1": "cpu", "model.layers.2": "disk"}
    whole.save_pretrained(tmp_path / "dense")
    spread = (
        type(whole)
        .from_pretrained(tmp_path / "dense", device_map=ends | layers, offload_folder=tmp_path / "folder")
        .eval()
    )
    devices = {name: p.device for name, p in spread.named_parameters()}
    batch, config = tiny_batch(whole, batch=16), PruningConfig(keep=0.7, metric="params", align=1)
    assert prune(spread, [batch], config).plan == prune(whole, [batch], config).plan
    assert {name: p.device for name, p in spread.named_parameters()} == devices
    assert distance(outputs(spread, on_gpu(batch)), outputs(whole, on_gpu(batch))) <= 1e-4
    assert save_pretrained(spread, tmp_path / "small") <= 1e-5


@pytest.mark.parametrize("class_name", FIRST)
def test_masked_sliced_repaired_reloaded(class_name, cut_shapes, tmp_path):
    """And with the CPU's weights, to rounding: the same plan, cut and refitted on both."""
    dense = tiny(class_name)
    batch, here, there = tiny_batch(dense), copy.deepcopy(dense), copy.deepcopy(dense).cuda()
    anatomy = describe(there)
    plan = cut_everywhere(anatomy, uniform=cut_shapes == "uniform")
    sliced = prune(copy.deepcopy(there), [batch], PruningConfig(repair="none"), plan=plan).model
    with masked(there, anatomy, plan):
        wanted = outputs(there, on_gpu(batch))
    assert distance(outputs(sliced, on_gpu(batch)), wanted) <= 1e-4

    for model in (here, there):
        prune(model, [batch], PruningConfig(), plan=plan)
    assert everything_on_gpu(there)
    found = [x.cpu() for x in outputs(there, on_gpu(batch))]
    assert distance(found, outputs(here, batch)) <= 5e-3
    assert save_pretrained(there, tmp_path / "small") <= 1e-5


@pytest.mark.parametrize("criterion", sorted(name for name, row in CRITERIA.items() if not row.of))
def test_scores_are_those_of_the_cpu(criterion):
    model = tiny("LlamaForCausalLM")
    config = within_reach(model, PruningConfig(metric="params", criterion=criterion, repair="none"))
    plans = [prune(each, [tiny_batch(model)], config).plan for each in (copy.deepcopy(model), model.cuda())]
    assert plans[0].hash == plans[1].hash


def test_one_budget_over_everything(tmp_path):
    texts, tokenizer = sentences(64, seed=3), bert()
    model = model_for("bert", "BertForSequenceClassification", tokenizer, num_hidden_layers=4).cuda()
    rows = [dict(tokenizer(texts[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 64, 8)]
    for i, row in enumerate(rows):
        row["labels"] = (torch.arange(8) + i) % 2
    units = ["heads", "neurons", "layers", "tokens"]
    config = PruningConfig(keep=0.6, metric="bytes", units=units, shapes="per_layer", align=4, candidates=4)
    result = prune(model, rows, config, processing_class=tokenizer, vocabulary=USED)
    assert result.report["keep"] <= 0.6
    assert len(result.report["divisions"]) > 1
    assert everything_on_gpu(model)
    save_pretrained(model, tmp_path / "small", processing_class=result.processing_class)
    assert describe(type(model).from_pretrained(tmp_path / "small")).sizes == describe(model).sizes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny("Qwen2ForCausalLM").to("cuda", dtype)
    config = within_reach(model, PruningConfig(metric="params", criterion="fisher_obs"))
    prune(model, [tiny_batch(model)], config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(torch.isfinite(x).all() for x in outputs(model, on_gpu(tiny_batch(model))))


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "LlamaForCausalLM"])
def test_training(class_name, tmp_path):
    run = trainer(tmp_path / "run", class_name, args={"use_cpu": False}, pruning={"rounds": 2, "shapes": "per_layer"})
    found = run.train()
    assert everything_on_gpu(run.model)
    assert found.training_loss > 0
    run.save_model(str(tmp_path / "small"))
    assert describe(type(run.model).from_pretrained(tmp_path / "small")).sizes == describe(run.model).sizes


def test_latency_of_this_device(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    wide = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16}
    model = tiny("BertForSequenceClassification", **wide).cuda()
    config = PruningConfig(
        keep=0.8, metric="latency", units=["neurons"], criterion="magnitude", repair="none", sequence_length=64,
        latency_batch_size=64,
    )  # fmt: skip
    result = prune(model, [tiny_batch(model, length=60)], config)
    assert result.report["keep"] <= 0.85
    assert everything_on_gpu(model)
