"""Bad input gets a clear error before anything is changed, and a save never leaves half of itself behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from tiny import changed, cut, cut_everywhere, cut_tiny, distance, keep, outputs, rows, snapshot, tiny, tiny_batch

from hf_prune import PruningConfig, PruningPlan, describe, prune, save_pretrained
from hf_prune.model.sites import consumer


@pytest.fixture
def bert():
    return tiny("BertForSequenceClassification").train()


def refused(model, match, config=None, data=None, **more):
    """prune() raises, and nothing about the model has changed."""
    before, history = snapshot(model), getattr(model, "_hf_prune", None)
    with pytest.raises(ValueError, match=match):
        prune(model, [tiny_batch(model)] if data is None else data, config, **more)
    assert list(changed(before, model)) == []
    assert getattr(model, "_hf_prune", None) is history


# --- the model -------------------------------------------------------------------------------------------------------


def test_unknown_family():
    """A model that has no row, and of which none can be derived."""
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
    )
    model = transformers.SwinForImageClassification(config)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"no family row for model_type 'swin', and none could be derived.*To add one"):
        prune(model, [{"pixel_values": torch.ones(8, 3, 32, 32)}])
    assert list(changed(before, model)) == []


def test_quantised_by_its_quantizer(bert):
    bert.hf_quantizer = SimpleNamespace()
    refused(bert, r"quantised.*dequantize")


def test_quantised_by_its_config(bert):
    bert.config.quantization_config = {"quant_method": "gptq"}
    refused(bert, r"quantised.*dequantize")


def test_integer_weights(bert):
    dense = bert.bert.encoder.layer[0].output.dense
    dense.weight = torch.nn.Parameter(dense.weight.data.to(torch.int8), requires_grad=False)
    refused(bert, r"layer\.0\.output\.dense\.weight holds torch\.int8")


def test_meta_device(bert):
    with pytest.raises(ValueError, match=r"is on the meta device"):
        prune(bert.to("meta"), [tiny_batch(bert)])


def test_one_offloaded_layer(bert):
    bert.bert.encoder.layer[1].to("meta")
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\..* is on the meta device"):
        prune(bert, [tiny_batch(bert)])


def test_sharded(bert):
    bert.classifier.weight.ds_id = 1  # what DeepSpeed puts on a partitioned parameter
    refused(bert, r"classifier\.weight is sharded")


def test_cross_attention_on_a_bert():
    config = tiny("BertForMaskedLM").config
    config.is_decoder = config.add_cross_attention = True
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(ValueError, match="cross-attention is only known for encoder-decoder"):
        describe(model)


# --- the data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_gradient_criteria_without_labels(bert, criterion):
    data = [{k: v for k, v in tiny_batch(bert).items() if k != "labels"}]
    refused(bert, r"needs a loss.*criterion='hessian'", PruningConfig(keep=0.95, criterion=criterion), data)


def test_fisher_without_a_head():
    model = transformers.BertModel(tiny("BertForMaskedLM").config)
    data = [{**tiny_batch(model), "labels": torch.ones(8, dtype=torch.long)}]
    refused(model, r"needs a loss.*BertModel", PruningConfig(keep=0.95, criterion="fisher"), data)


def test_seven_examples(bert):
    data = [rows(tiny_batch(bert), slice(0, 7))]
    refused(bert, "7 calibration examples: at least 8", PruningConfig(keep=0.95), data)


def test_no_examples(bert):
    refused(bert, "0 calibration examples: at least 8", PruningConfig(keep=0.95), [])


@pytest.mark.parametrize("data", ["text", {"input_ids": torch.ones(8, 4)}, 3])
def test_data_in_another_form(bert, data):
    refused(bert, "list or iterable of batches", PruningConfig(keep=0.95), data)


@pytest.mark.parametrize("batch", [{}, {"input_ids": [1, 2]}, [1, 2], {"a": torch.ones(3), "b": torch.ones(4)}])
def test_batches_in_another_form(bert, batch):
    refused(bert, "dict of (real )?tensors", PruningConfig(keep=0.95), [batch])


def test_dataset_without_known_columns(bert):
    data = Dataset.from_dict({"text": ["a"] * 9})
    refused(
        bert, r"\['text'\] hold no input of BertForSequenceClassification; tokenise", PruningConfig(keep=0.95), data
    )


# --- the target ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, float("nan"), float("inf"), True])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"0 < keep <= 1"):
        PruningConfig(keep=keep)


@pytest.mark.parametrize(
    ("field", "value"),
    [("metric", "flops"), ("scope", "layer"), ("shapes", "any"), ("repair", "train"), ("criterion", "snip")],
)
def test_unknown_choices(field, value):
    with pytest.raises(ValueError, match=f"{field}='{value}' is not one of "):
        PruningConfig(**{field: value})


@pytest.mark.parametrize(("units", "match"), [(["expert"], "units='expert'"), ([], "name at least one of")])
def test_unknown_units(units, match):
    with pytest.raises(ValueError, match=match):
        PruningConfig(units=units)


@pytest.mark.parametrize("field", ["calibration_samples", "sequence_length", "align"])
def test_numbers_below_their_least(field):
    with pytest.raises(ValueError, match=f"{field}=0: must be at least"):
        PruningConfig(**{field: 0})


def test_unreachable_keep(bert):
    match = r"keep=0\.2 .*units=\['neurons'\] and shapes='stock': the least is 0\.\d+.*shapes='uniform' 0\.\d+"
    refused(bert, match, PruningConfig(keep=0.2))


def test_unreachable_keep_with_heads_alone(bert):
    match = r"units=\['heads'\] and shapes='uniform': the least is 0\.\d+"
    refused(bert, match, PruningConfig(keep=0.2, shapes="uniform", units=["heads"]))


def test_heads_of_a_stock_bert(bert):
    refused(bert, r"stock bert config cannot say another number of heads", PruningConfig(keep=0.9, units=["heads"]))


def unequal_llama():
    """One of two KV groups in the first layer, both in the second; 30 and 40 neurons."""
    model = tiny("LlamaForCausalLM")
    kept = {"attention": [(1,), (0, 1)], "ffn": [range(30), range(40)]}
    sites = tuple(keep(s, kept[s.kind][s.layer], s.outer.name) for s in describe(model).sites)
    return cut(model, PruningPlan("llama", sites))


@pytest.mark.parametrize("shapes", ["stock", "uniform"])
def test_layers_that_differ_are_made_equal(shapes):
    model = unequal_llama()
    prune(model, [tiny_batch(model)], PruningConfig(keep=0.7, shapes=shapes, repair="none"))
    sites = describe(model).sites
    assert [len({tuple(s.sizes.items()) for s in sites if s.kind == kind}) for kind in ("attention", "ffn")] == [1, 1]
    assert not model.config.to_dict().get("per_layer_config")


@pytest.mark.parametrize(("units", "site"), [(["neurons"], "attention"), (["kv_groups"], "ffn")])
@pytest.mark.parametrize("shapes", ["stock", "uniform"])
def test_layers_that_differ_in_what_is_not_cut(shapes, units, site):
    config = PruningConfig(keep=0.85, shapes=shapes, units=units, repair="none")
    refused(unequal_llama(), rf"layer 0 {site} and the 1 sites that must match it differ already.*per_layer", config)


@pytest.mark.parametrize("shapes", ["stock", "uniform"])
def test_kv_groups_of_different_sizes_are_no_equal_counts(shapes):
    """One group of one head and one of two: the same count of groups, but no config of one head count."""
    config = PruningConfig(keep=0.7, shapes=shapes, units=["kv_groups", "neurons"], repair="none")
    refused(cut_tiny("LlamaForCausalLM", "per_layer"), r"attention and the 1 sites.*differ already.*per_layer", config)


@pytest.mark.parametrize("shapes", ["stock", "uniform"])
def test_kv_groups_of_different_sizes_are_made_equal_by_their_heads(shapes):
    model = cut_tiny("LlamaForCausalLM", "per_layer")
    prune(model, [tiny_batch(model)], PruningConfig(keep=0.7, shapes=shapes, repair="none"))
    assert [site.sizes for site in describe(model).sites if site.inner.mixes] == [{"kv_groups": 1, "heads": 1}] * 2
    assert not model.config.to_dict().get("per_layer_config")


@pytest.mark.parametrize(
    "class_name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "T5EncoderModel"]
)
def test_bias_repair_without_biases(class_name):
    config = PruningConfig(keep=0.9, metric="params", repair="bias", criterion="magnitude")
    refused(tiny(class_name), r"repair='bias' needs a bias.*least_squares", config)


@pytest.mark.parametrize("criterion", ["fisher", "taylor", "activation", "fluctuation", "hessian", "magnitude"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_site(criterion, value):
    """Not a number in the first site's own weights: every criterion meets it there."""
    model = tiny("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = value
        model.model.layers[0].mlp.up_proj.weight[0, 0] = value
    before = snapshot(model)
    config = PruningConfig(keep=0.9, criterion=criterion)
    with pytest.raises(ValueError, match=r"(encoder|decoder) layer \d .*(NaN|infinite)"):
        prune(model, [tiny_batch(model)], config)
    assert snapshot(model)["config"] == before["config"]
    after = model.state_dict()
    assert all(torch.equal(before["weights"][k].nan_to_num(), after[k].nan_to_num()) for k in after)


# --- the plan --------------------------------------------------------------------------------------------------------


def test_plan_for_another_model_type(bert):
    plan = cut_everywhere(describe(tiny("ElectraForSequenceClassification")))
    refused(bert, r"made for model_type 'electra', the model is 'bert'", plan=plan)


def test_plan_for_other_sizes(bert):
    plan = cut_everywhere(describe(tiny("BertForSequenceClassification", intermediate_size=64)))
    refused(bert, rf"{plan.hash[:12]}.*plan 64 neurons, model 48", plan=plan)


def test_plan_for_fewer_layers(bert):
    plan = cut_everywhere(describe(tiny("BertForSequenceClassification", num_hidden_layers=1)))
    refused(bert, "not in the plan", plan=plan)


def test_plan_with_heads_unevenly_over_groups():
    """2 of one group's heads and 1 of the other's: grouped attention cannot run that."""
    model = tiny("LlamaForCausalLM")
    sites = tuple(keep(s, (0, 1, 2)) if s.inner.mixes else keep(s) for s in describe(model).sites)
    match = "remaining kv_groups must keep the same number of heads"
    refused(model, match, PruningConfig(repair="none"), plan=PruningPlan("llama", sites))


def test_plan_with_different_heads_in_coupled_blocks():
    """T5's blocks share block 0's position bias: other heads in block 1 would be silently wrong after a reload."""
    model = tiny("T5EncoderModel")
    sites = tuple(keep(s, (s.layer, 3)) if s.inner.mixes else keep(s) for s in describe(model).sites)
    refused(model, "must keep the same heads", PruningConfig(repair="none"), plan=PruningPlan("t5", sites))


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_bert():
    return cut_tiny("BertForSequenceClassification", "per_layer")


def test_directory_that_is_not_empty(cut_bert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not empty.*overwrite=True"):
        save_pretrained(cut_bert, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_target_that_is_a_file(cut_bert, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError):
        save_pretrained(cut_bert, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_empty_directory_is_fine(cut_bert, tmp_path):
    (tmp_path / "out").mkdir()
    save_pretrained(cut_bert, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_overwrite_replaces(cut_bert, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    save_pretrained(cut_bert, tmp_path / "out", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/old.txt").exists()
    assert (tmp_path / "out/config.json").is_file()


def half_a_save(directory, **_):
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(b"half")
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("before", ["nothing", "an older save"])
def test_a_full_disk_leaves_nothing(cut_bert, tmp_path, monkeypatch, before):
    if before != "nothing":
        save_pretrained(cut_bert, tmp_path / "out")
    monkeypatch.setattr(cut_bert, "save_pretrained", half_a_save)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(cut_bert, tmp_path / "out", overwrite=True)
    if before == "nothing":
        assert list(tmp_path.iterdir()) == []
    else:
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        reloaded = type(cut_bert).from_pretrained(tmp_path / "out").eval()
        assert distance(outputs(reloaded, tiny_batch(cut_bert)), outputs(cut_bert, tiny_batch(cut_bert))) <= 1e-5


def test_a_killed_save_leaves_nothing_under_the_final_name(tmp_path):
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from tiny import cut_tiny
        from hf_prune.checkpoint import save
        model = cut_tiny("BertForSequenceClassification", "per_layer")
        save.prove = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written, nothing is proven
        save.save_pretrained(model, {str(tmp_path / "out")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "out").exists()
    save_pretrained(cut_tiny("BertForSequenceClassification", "per_layer"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_checkpoint_that_does_not_reproduce_is_not_left(cut_bert, tmp_path, monkeypatch):
    """One weight written wrongly."""
    from safetensors.torch import load_file, save_file

    real = cut_bert.save_pretrained

    def corrupt(directory, **kwargs):
        real(directory, **kwargs)
        path = os.path.join(directory, "model.safetensors")
        weights = load_file(path)
        weights["bert.encoder.layer.1.output.dense.bias"][0] += 0.5
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(cut_bert, "save_pretrained", corrupt)
    with pytest.raises(RuntimeError, match=r"does not reproduce.*Nothing was saved"):
        save_pretrained(cut_bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_weight_is_not_left(cut_bert, tmp_path, monkeypatch):
    """transformers would only warn and fill it with random numbers."""
    real = cut_bert.save_pretrained

    def forget(directory, **kwargs):
        weights = {k: v for k, v in cut_bert.state_dict().items() if "layer.1.intermediate.dense.weight" not in k}
        real(directory, state_dict=weights, **kwargs)

    monkeypatch.setattr(cut_bert, "save_pretrained", forget)
    with pytest.raises(RuntimeError, match="does not reproduce"):
        save_pretrained(cut_bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_not_proven(cut_bert, tmp_path):
    with torch.no_grad():
        consumer(cut_bert, describe(cut_bert).sites[-1]).weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="does not reproduce"):
        save_pretrained(cut_bert, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_proof_can_be_given_batches(cut_bert, tmp_path):
    assert save_pretrained(cut_bert, tmp_path / "out", batches=[tiny_batch(cut_bert)]) <= 1e-4


@pytest.mark.parametrize("model_type", ["qwen2", "bert"])
def test_no_such_door(tmp_path, model_type):
    model = cut_tiny("LlamaForCausalLM", "uniform")
    with pytest.raises(ValueError, match=f"cannot be saved as '{model_type}'; allowed: 'mistral'"):
        save_pretrained(model, tmp_path / "out", model_type=model_type)
    assert list(tmp_path.iterdir()) == []


def test_mistral_needs_equal_layers(tmp_path):
    model = cut_tiny("LlamaForCausalLM", "per_layer")
    with pytest.raises(ValueError, match="same sizes in every layer"):
        save_pretrained(model, tmp_path / "out", model_type="mistral")
    assert list(tmp_path.iterdir()) == []


def test_only_transformers_models(tmp_path):
    with pytest.raises(TypeError, match=r"takes a transformers PreTrainedModel, got .*Linear"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")


def test_sequence_to_sequence_without_decoder_inputs():
    model = tiny("T5ForConditionalGeneration")
    batch = {key: value for key, value in tiny_batch(model).items() if key != "labels"}
    refused(model, r"needs labels or decoder_input_ids", data=[batch])
