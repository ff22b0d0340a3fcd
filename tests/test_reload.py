"""Saved models open again with the same outputs, in a process of their own: one process per scenario."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tiny import CLASSES, FAMILY_OF, cut_tiny, distance, outputs, tiny_batch

from hf_prune import PruningPlan, prune, save_pretrained
from hf_prune.checkpoint.convert import auto_classes
from hf_prune.config import PruningConfig

ALL = [name for names in CLASSES.values() for name in names]
FIRST = [names[0] for names in CLASSES.values()]
LOUD = (  # what transformers says of weights, and of head counts, that its own class does not build
    r"RuntimeError: You set `ignore_mismatched_sizes` to `False`"
    r"|ValueError: .*(is not a multiple of the number of attention heads|must be divisible by num_heads)"
    r"|ValueError: config.n_heads \d+ must divide config"
)
SCRIPT = Path(__file__).with_name("reopen.py")


def job(name, model, directory, opener=None, batch=None, **options):
    """A line of work for reopen.py; the reference outputs lie beside the directory."""
    inputs = batch or {k: v for k, v in tiny_batch(model).items() if "positions" not in k}
    if not model.config.is_encoder_decoder:
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
    kept = Path(directory).with_suffix(".pt")
    torch.save({"inputs": inputs, "outputs": raw_outputs(model, inputs)}, kept)
    opener = opener or type(model).__name__
    return {"name": name, "directory": str(directory), "opener": opener, "inputs": str(kept), "options": options}


@torch.no_grad()
def raw_outputs(model, inputs):
    return [x for x in model.eval()(**inputs).to_tuple() if isinstance(x, torch.Tensor)]


def reopen(jobs, tmp_path, hf_prune):
    """name -> difference or error, from a fresh process where hf_prune is "blocked" or "imported"."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    env = {**os.environ, "HF_PRUNE": hf_prune, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "jobs.json")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def differing(found, tolerance=1e-5):
    return {name: value for name, value in found.items() if isinstance(value, str) or not value <= tolerance}


def test_stock_opens_without_hf_prune(tmp_path):
    """Every class, both by its own class and by its Auto class; nothing in the config needs hf_prune."""
    jobs = []
    for name in ALL:
        model = cut_tiny(name, "stock")
        save_pretrained(model, tmp_path / name)
        jobs.append(job(name, model, tmp_path / name))
        if name in FIRST:
            jobs.append({**jobs[-1], "name": f"{name} (Auto)", "opener": auto_classes(type(model))[0]})
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["model_type"] == FAMILY_OF[name]
        assert not config.get("per_layer_config")
        assert "auto_map" not in config
    found = reopen(jobs, tmp_path, "blocked")
    assert len(found) == len(ALL) + len(FIRST)
    assert differing(found) == {}


@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_other_shapes_open_after_importing_hf_prune(tmp_path, shapes):
    jobs = []
    for name in ALL:
        model = cut_tiny(name, shapes)
        save_pretrained(model, tmp_path / name)
        jobs.append(job(name, model, tmp_path / name))
        if name in FIRST:
            jobs.append({**jobs[-1], "name": f"{name} (Auto)", "opener": auto_classes(type(model))[0]})
    assert differing(reopen(jobs, tmp_path, "imported")) == {}


def test_other_shapes_fail_loudly_without_hf_prune(tmp_path):
    """Whatever the stock class would build differently raises; what it can build, it builds right."""
    jobs, forms = [], {}
    for name in ALL:
        for shapes in ("uniform", "per_layer"):
            model = cut_tiny(name, shapes)
            key = f"{name}-{shapes}"
            model.save_pretrained(tmp_path / key)
            forms[key] = model.config.hf_prune["shapes"]
            jobs.append(job(key, model, tmp_path / key))
    found = reopen(jobs, tmp_path, "blocked")
    assert differing({key: value for key, value in found.items() if forms[key] == "stock"}) == {}
    quiet = {key: value for key, value in found.items() if forms[key] != "stock" and not re.match(LOUD, str(value))}
    assert quiet == {}
    assert set(forms.values()) == {"stock", "uniform", "per_layer"}


def test_remote_code_opens_without_hf_prune(tmp_path):
    jobs = []
    for family in ("bert", "llama", "t5"):
        for name in CLASSES[family]:
            for shapes in ("uniform", "per_layer"):
                model = cut_tiny(name, shapes)
                target = tmp_path / f"{name}-{shapes}"
                save_pretrained(model, target, remote_code=True)
                assert [p.name for p in target.glob("*.py")] == ["modeling_hf_prune.py"]
                opener = auto_classes(type(model))[0]
                jobs.append(job(target.name, model, target, opener, trust_remote_code=True))
    assert differing(reopen(jobs, tmp_path, "blocked")) == {}


def test_plain_save_pretrained_opens(tmp_path):
    """model.save_pretrained after prune() is right too, and a reloaded model can be saved again."""
    jobs = []
    for name in FIRST:
        model = cut_tiny(name, "per_layer")
        model.save_pretrained(tmp_path / name)
        again = type(model).from_pretrained(tmp_path / name).eval()
        again.save_pretrained(tmp_path / f"{name}-again")
        jobs += [job(name, model, tmp_path / name), job(f"{name}-again", model, tmp_path / f"{name}-again")]
    assert differing(reopen(jobs, tmp_path, "imported")) == {}


@pytest.mark.parametrize("class_name", FIRST)
def test_a_reloaded_model_can_be_pruned_again(tmp_path, class_name):
    """The plan of the second cut is composed with the one found beside the weights."""
    model = cut_tiny(class_name, "per_layer")
    save_pretrained(model, tmp_path / "once")
    reloaded = type(model).from_pretrained(tmp_path / "once").eval()
    config = PruningConfig(
        keep=0.95, metric="params", shapes="per_layer", repair="none", criterion="magnitude", align=1
    )
    result = prune(reloaded, [tiny_batch(model)], config)
    save_pretrained(reloaded, tmp_path / "twice")
    expected = PruningPlan.load(tmp_path / "once/pruning_plan.json").compose(result.plan)
    assert PruningPlan.load(tmp_path / "twice/pruning_plan.json").hash == expected.hash
    third = type(model).from_pretrained(tmp_path / "twice").eval()
    assert distance(outputs(third, tiny_batch(model)), outputs(reloaded, tiny_batch(model))) <= 1e-5


def test_bfloat16_stays_bfloat16(tmp_path):
    model = cut_tiny("LlamaForCausalLM", "per_layer").to(torch.bfloat16)
    save_pretrained(model, tmp_path / "half")
    with safe_open(tmp_path / "half/model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert type(model).from_pretrained(tmp_path / "half").dtype == torch.bfloat16


# --- what goes with the weights --------------------------------------------------------------------------------------


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "good", "bad", "film", "plot", "with", "no"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]",
        model_max_length=64, padding_side="right",
    )  # fmt: skip


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
def test_label_maps_survive(tmp_path, shapes):
    labels = {0: "bad", 1: "fair", 2: "good"}
    ids = {label: i for i, label in labels.items()}
    model = cut_tiny("BertForSequenceClassification", shapes, num_labels=3, id2label=labels, label2id=ids)
    save_pretrained(model, tmp_path / "m", processing_class=tiny_tokenizer())
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    assert config.id2label == labels
    assert config.label2id == ids
    text = "a good film with no plot"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")(text) == tiny_tokenizer()(text)


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
def test_generation_config_survives(tmp_path, shapes):
    model = cut_tiny("LlamaForCausalLM", shapes)
    model.generation_config.max_length = 37
    model.generation_config.repetition_penalty = 1.3
    save_pretrained(model, tmp_path / "m")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config
    assert (again.max_length, again.repetition_penalty) == (37, 1.3)
    assert again.to_dict() == model.generation_config.to_dict() | {
        "transformers_version": again.to_dict().get("transformers_version")
    }


def test_plan_and_summary_lie_beside_the_weights(tmp_path):
    model = cut_tiny("LlamaForCausalLM", "per_layer")
    save_pretrained(model, tmp_path / "m")
    plan = PruningPlan.load(tmp_path / "m/pruning_plan.json")
    assert plan.hash == model._hf_prune.plan.hash
    entry = json.loads((tmp_path / "m/config.json").read_text())["hf_prune"]
    assert entry["format"] == 2
    assert entry["plan"] == plan.hash
    assert {"version", "base_model", "criterion", "before", "after", "dense"} <= set(entry)


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
@pytest.mark.parametrize(
    ("task", "class_name"),
    [("text-classification", "BertForSequenceClassification"), ("text-generation", "LlamaForCausalLM")],
)
def test_pipelines_open_the_directory(tmp_path, shapes, task, class_name):
    model = cut_tiny(class_name, shapes)
    save_pretrained(model, tmp_path / "m", processing_class=tiny_tokenizer())
    pipe = transformers.pipeline(task, model=str(tmp_path / "m"), device="cpu")
    if task == "text-generation":
        answer = pipe("a good film", max_new_tokens=4, do_sample=False, return_tensors=True)[0]
        assert len(answer["generated_token_ids"]) > 3
    else:
        answer = pipe("a good film", top_k=None)
        logits = model(**tiny_tokenizer()("a good film", return_tensors="pt")).logits.softmax(-1)[0]
        assert sorted(x["score"] for x in answer) == pytest.approx(sorted(logits.tolist()), abs=1e-5)


def test_llama_with_odd_head_count_opens_as_mistral(tmp_path):
    """3 of 8 heads do not divide hidden 32, which the Llama config demands; the same weights are a stock Mistral."""
    from tiny import cut, keep, tiny

    from hf_prune import describe

    model = tiny("LlamaForCausalLM", num_attention_heads=8, num_key_value_heads=8)
    sites = [keep(s, (0, 3, 6) if s.inner.mixes else range(0, 48, 2)) for s in describe(model).sites]
    cut(model, PruningPlan("llama", tuple(sites)))
    before = model.config.to_dict()
    save_pretrained(model, tmp_path / "mistral", model_type="mistral")
    assert model.config.to_dict() == before
    config = json.loads((tmp_path / "mistral/config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"], config["head_dim"]) == ("mistral", 3, 4)
    assert config["architectures"] == ["MistralForCausalLM"]
    found = reopen([job("mistral", model, tmp_path / "mistral", "AutoModelForCausalLM")], tmp_path, "blocked")
    assert differing(found) == {}
    save_pretrained(model, tmp_path / "llama")  # and as Llama after `import hf_prune`
    found = reopen([job("llama", model, tmp_path / "llama", "AutoModelForCausalLM")], tmp_path, "imported")
    assert differing(found) == {}
