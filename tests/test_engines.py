"""What opens a checkpoint is read off its config, and what no test runs says so."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest
from tiny import tiny_batch, tiny_model

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.model.families import FAMILIES
from hf_prune.report.engines import ENGINES, NOT_RUN, checkpoint_rows, engine_rows, verdict


def saved(tmp_path, family, class_name, shapes, keep=0.8):
    model = tiny_model(family, class_name)
    given = {"keep": keep, "shapes": shapes, "align": 4, "calibration_samples": 64, "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(**given))
    save_pretrained(model, tmp_path / "m")
    return {row["engine"]: row["opens it"] for row in checkpoint_rows(tmp_path / "m")}


def test_a_stock_llama_opens_in_every_engine_of_language_models(tmp_path):
    found = saved(tmp_path, "llama", "LlamaForCausalLM", "stock")
    assert found["transformers"] == "yes"
    assert found["vLLM"] == "yes"
    assert found["SGLang"] == f"yes ({NOT_RUN})"
    assert "hf-prune export --to gguf" in found["llama.cpp"]
    assert found["TEI"] == "no: it has no llama"


def test_a_bert_with_fewer_heads_goes_through_onnx(tmp_path):
    found = saved(tmp_path, "bert", "BertForSequenceClassification", "uniform", keep=0.5)
    assert "import hf_prune" in found["transformers"]
    assert "export --to onnx" in found["ONNX Runtime"]
    assert found["TEI"].startswith("no: its own code builds every layer alike; export to ONNX")


def test_a_llama_whose_layers_differ_goes_through_decilm(tmp_path):
    found = saved(tmp_path, "llama", "LlamaForCausalLM", "per_layer", keep=0.6)
    for engine in ("vLLM", "SGLang"):
        assert found[engine].startswith("by `hf-prune export --to decilm`, with the same query heads in every layer")
    assert NOT_RUN not in found["vLLM"]
    assert found["vLLM --model-impl transformers"] == "where hf_prune is installed beside it"
    assert found["SGLang"].endswith(f"FFN widths in multiples of 256 ({NOT_RUN})")

    vllm = next(engine for engine in ENGINES if engine.name == "vLLM")
    assert verdict(vllm, "llama", False, "LlamaForSequenceClassification").startswith("no: its own code builds")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_its_rows(family):
    rows = engine_rows(family)
    assert [row["engine"] for row in rows] == [engine.name for engine in ENGINES]
    assert all(row["stock"] and row["other shapes"] for row in rows)


def test_what_is_not_run_says_so():
    for engine in ENGINES:
        known = engine.stock[0] if engine.stock else "bert"
        assert verdict(engine, known, True).endswith(f"({NOT_RUN})") == (not engine.is_run)
        for other in {*engine.stock} - {*engine.run_types} if engine.run_types else ():
            assert verdict(engine, other, True).endswith(f"({NOT_RUN})")


def test_vllm_finds_the_loader():
    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "hf_prune")
    assert found.value == "hf_prune.checkpoint.loader:install_loader"
    assert callable(found.load())
