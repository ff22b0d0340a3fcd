"""ONNX graphs of every shape, run by ONNX Runtime beside torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model

from hf_prune import PruningConfig, prune

pytest.importorskip("onnxruntime", reason="needs hf-prune[onnx]")
pytest.importorskip("onnxscript", reason="needs hf-prune[onnx]")

import onnx
from transformers.exporters import ExportQuantizer

from hf_prune.export import onnx as onnx_export
from hf_prune.export.kernels import CpuKernels
from hf_prune.export.onnx import to_onnx
from hf_prune.model.probe import cache_argument

CONFIG = {"align": 4, "calibration_samples": 16, "sequence_length": 12}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")


def small(family, class_name, shapes):
    model = tiny_model(family, class_name)
    prune(model, [tiny_batch(model, 16)], PruningConfig(keep=0.6, shapes=shapes, **CONFIG))
    return model


@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
@pytest.mark.parametrize(
    ("family", "class_name"),
    [
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertForTokenClassification"),
        ("bert", "BertModel"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("roberta", "RobertaForSequenceClassification"),
        ("electra", "ElectraForQuestionAnswering"),
        ("vit", "ViTForImageClassification"),
        ("gpt2", "GPT2ForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
    ],
)
def test_one_graph(tmp_path, family, class_name, shapes):
    assert to_onnx(small(family, class_name, shapes), tmp_path / "onnx") <= 1e-3
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def test_int8_is_smaller(tmp_path):
    model = small("bert", "BertForSequenceClassification", "per_layer")
    to_onnx(model, tmp_path / "fp32")
    to_onnx(model, tmp_path / "int8", int8=True)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("fp32", "int8")]
    assert sizes[1] < sizes[0]


def operators(directory):
    return [node.op_type for node in onnx.load(directory / "model.onnx", load_external_data=False).graph.node]


def test_int8_reaches_every_projection(tmp_path):
    model = small("bert", "BertForSequenceClassification", "per_layer")
    to_onnx(model, tmp_path, int8=True)
    names = operators(tmp_path)
    assert names.count("MatMulInteger") == 4 * model.config.num_hidden_layers + 2  # q, k, v in one; pooler, classifier
    assert not {"Attention", "MatMul", "Gemm"} & {*names}


def test_residual_norms_are_taken_apart(tmp_path):
    to_onnx(small("bert", "BertModel", "uniform"), tmp_path)
    assert "SkipLayerNormalization" not in operators(tmp_path)


def test_the_graph_names_no_place_on_this_machine(tmp_path):
    to_onnx(small("bert", "BertModel", "uniform"), tmp_path)
    assert str(Path(torch.__file__).parent.parent).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_attention_taken_apart_minds_the_mask(tmp_path, monkeypatch):
    class Untouched(ExportQuantizer):
        def quantize(self, model, sample_inputs, export_format):
            return model

    exporter, config = onnx_export._exporter(int8=False)
    config.quantizer = CpuKernels(Untouched())
    monkeypatch.setattr(onnx_export, "_exporter", lambda int8: (exporter, config))
    model = small("bert", "BertForSequenceClassification", "per_layer")
    batch = tiny_batch(model, 4)
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < torch.tensor([[12], [3], [7], [5]])).long()
    assert to_onnx(model, tmp_path, [batch]) <= 1e-5
    assert {"Attention", "MultiHeadAttention"} & {*operators(tmp_path)} == {"MultiHeadAttention"}


@pytest.mark.parametrize(
    ("family", "class_name"),
    [("llama", "LlamaForCausalLM"), ("gpt2", "GPT2LMHeadModel"), ("qwen2", "Qwen2ForCausalLM")],
)
def test_decoders_with_their_cache(tmp_path, family, class_name):
    from transformers.exporters import ExportedModel

    model = small(family, class_name, "per_layer").eval()
    assert to_onnx(model, tmp_path / "onnx") <= 1e-3
    exported = ExportedModel.from_pretrained(tmp_path / "onnx")
    ids = torch.arange(8, 16)[None]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 8:].tolist()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(8)[None]}
    output, cache = exported.runners["prefill"](**given), cache_argument(model)
    found = []
    for length in range(9, 15):
        found.append(int(output.logits[0, -1].argmax()))
        mask = torch.ones(1, length, dtype=torch.long)
        positions = torch.tensor([[length - 1]])
        given = {"input_ids": torch.tensor([found[-1:]]), "attention_mask": mask, "position_ids": positions}
        output = exported.runners["decode"](**given, **{cache: getattr(output, cache)})
    assert found == expected


@pytest.mark.parametrize(
    ("family", "class_name"),
    [
        ("t5", "T5ForConditionalGeneration"),
        pytest.param("bart", "BartForConditionalGeneration", marks=pytest.mark.slow),
    ],
)
def test_encoder_decoders_with_their_cache(tmp_path, family, class_name):
    from transformers.exporters import ExportedModel

    model = small(family, class_name, "per_layer").eval()
    assert to_onnx(model, tmp_path / "onnx") <= 1e-3
    run, cache = ExportedModel.from_pretrained(tmp_path / "onnx").runners, cache_argument(model)
    ids = torch.arange(8, 15)[None]
    read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    start = model.config.decoder_start_token_id
    plain = {"do_sample": False, "eos_token_id": None, "forced_bos_token_id": None, "forced_eos_token_id": None}
    expected = model.generate(**read, max_new_tokens=6, **plain)[0, 1:].tolist()
    encoded = run["encoder"](**read)
    given = {"attention_mask": read["attention_mask"], "encoder_outputs": encoded}
    output = run["prefill"](**given, decoder_input_ids=torch.tensor([[start]]))
    found = []
    for _ in range(6):
        found.append(int(output.logits[0, -1].argmax()))
        output = run["decode"](**given, decoder_input_ids=torch.tensor([found[-1:]]), **{cache: getattr(output, cache)})
    assert found == expected


def test_an_encoder_of_an_encoder_decoder_is_one_graph(tmp_path):
    assert to_onnx(small("t5", "T5EncoderModel", "uniform"), tmp_path / "onnx") <= 1e-3
    assert (tmp_path / "onnx" / "model.onnx").is_file()


def test_labels_tell_what_the_decoder_reads(tmp_path):
    model = tiny_model("t5", "T5ForConditionalGeneration")
    given = onnx_export.graph_inputs(
        model, {"input_ids": torch.ones(2, 4), "labels": torch.tensor([[5, 6], [7, -100]])}
    )
    start = model.config.decoder_start_token_id
    assert given["decoder_input_ids"][:, 0].tolist() == [start, start]
    assert given["decoder_input_ids"][:, 1].tolist() == [5, 7]
    without = onnx_export.graph_inputs(model, {"input_ids": torch.ones(2, 4)})
    assert without["decoder_input_ids"].tolist() == [[start] * 3] * 2


def test_a_model_of_sound(tmp_path):
    model = tiny_model("whisper", "WhisperForConditionalGeneration").eval()
    with pytest.raises(ValueError, match=r"reads input_features, of which no example is at hand.*batches="):
        to_onnx(model, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
    given = onnx_export.graph_inputs(model, tiny_batch(model, 2))
    assert given["decoder_input_ids"].tolist() == [[model.config.decoder_start_token_id] * 3] * 2


@pytest.mark.slow
def test_the_graphs_of_a_model_of_sound(tmp_path):
    model = small("whisper", "WhisperForConditionalGeneration", "per_layer")
    assert to_onnx(model, tmp_path / "onnx", [tiny_batch(model, 2)]) <= 1e-3


def weights_of(path):
    held = onnx.load(path, load_external_data=False).graph.initializer
    return {
        weight.name: {entry.key: entry.value for entry in weight.external_data}
        for weight in held
        if weight.external_data
    }


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_graphs_read_one_copy_of_the_weights(tmp_path, int8):
    model = tiny_model("llama", "LlamaForCausalLM")
    to_onnx(model, tmp_path / "onnx", int8=int8)
    assert (tmp_path / "onnx" / "decode.onnx.data").stat().st_size == 0
    stored = (tmp_path / "onnx" / "prefill.onnx.data").stat().st_size
    assert stored <= (1 if int8 else 4) * sum(p.numel() for p in model.parameters()) * 1.1 + 64 * 50
    for name in ("prefill", "decode"):
        found = weights_of(tmp_path / "onnx" / f"{name}.onnx").values()
        assert {place["location"] for place in found} == {"prefill.onnx.data"}


def test_a_graph_that_differs_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match=r"differ from torch's .* Nothing was saved"):
        to_onnx(tiny_model("bert"), tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("here")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        to_onnx(tiny_model("bert"), tmp_path)
