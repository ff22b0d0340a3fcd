"""The model card: what is on it, where its numbers come from, and what it says when there are none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import training
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny import tiny_batch, tiny_model
from transformers import AutoModelForSequenceClassification

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.checkpoint.history import PLAN_FILE
from hf_prune.checkpoint.proof import PROOF_FILE
from hf_prune.report.card import write_card
from hf_prune.report.evidence import EVALUATION, write_evaluation
from hf_prune.report.int8 import compare_int8, write_int8
from hf_prune.report.measure import compare
from hf_prune.report.render import MEASUREMENTS, write
from hf_prune.report.table import count

pytest.importorskip("matplotlib", reason="needs hf-prune[plots]")
RESULTS = {"dense": {"accuracy": 0.8125}, "pruned": {"accuracy": 0.7969}}


ONE = pytest.mark.parametrize("made", ["per_layer"], indirect=True)  # what is the same for all


@pytest.fixture(scope="module", params=["per_layer", "uniform", "stock"])
def made(request, tmp_path_factory):
    """A directory with a dense and a pruned checkpoint, and all evidence beside the latter."""
    home = tmp_path_factory.mktemp("made")
    tiny_model("bert").save_pretrained(home / "dense")
    (home / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# dense\n")
    model = AutoModelForSequenceClassification.from_pretrained(home / "dense")
    given = {"keep": 0.8, "shapes": request.param, "align": 4, "calibration_samples": 64, "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(**given))
    directory = home / "small"
    save_pretrained(model, directory)
    write_evaluation(directory, RESULTS, dataset="me/reviews", split="test", rows=64, command="a script")
    models = {"dense": home / "dense", "small": directory}
    write(compare(models, shapes=((1, 8), (2, 8)), runs=3, warmup=1), directory)
    return home


@pytest.fixture
def small(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made") / "small"


@ONE
def test_a_card_is_read_by_the_hub(small):
    card = ModelCard.load(str(write_card(small, base_model="me/dense-bert", name="small-bert")))
    assert card.data.base_model == "me/dense-bert"
    assert card.data.library_name == "transformers"
    assert card.data.datasets == ["me/reviews"]
    assert card.data.pipeline_tag == "text-classification"
    assert "pruned" in card.data.tags
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy (pruned)": 0.7969, "accuracy (dense, before pruning)": 0.8125}


@ONE
def test_the_licence_is_that_of_the_base_model(small):
    assert ModelCard.load(str(write_card(small))).data.license == "mit"
    assert ModelCard.load(str(write_card(small, license="apache-2.0"))).data.license == "apache-2.0"


@ONE
def test_it_says_what_was_lost_and_gained_first(small):
    text = write_card(small).read_text().split("---\n", 2)[2].strip()
    headline = text.splitlines()[2]
    assert "accuracy 0.7969 (dense 0.8125)" in headline
    assert re.search(r"\d+% of its multiply-adds", headline)
    assert re.search(r"\d\.\d\d× as fast at", headline)


def test_every_picture_is_there(small):
    text = write_card(small).read_text()
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 3
    for picture in pictures:
        assert (small / picture).read_bytes().startswith(b"\x89PNG")


def test_every_number_of_the_tables_is_in_a_file(small):
    """Milliseconds, metrics and counts; shares and speed-ups follow from them."""
    text = write_card(small).read_text()
    measured = json.loads((small / MEASUREMENTS).read_text()).values()
    plan = json.loads((small / PLAN_FILE).read_text())

    def shown(title):
        rows = [line for line in text.splitlines() if line.startswith(f"| {title}")]
        return [re.split(r" [(m]", cell.strip())[0] for cell in rows[0].split("|")[2:4]]

    for at, title in enumerate(("forward, 1 × 8", "forward, 2 × 8")):
        assert shown(title) == [f"{model['latency'][at]['median_ms']:.1f}" for model in measured]
    assert shown("size on disk") == [f"{count(model['bytes'])}B" for model in measured]
    assert shown("parameters") == [count(plan["cost"][when]["params_model"]) for when in ("before", "after")]
    assert shown("multiply-adds") == [count(plan["cost"][when]["macs_model"]) for when in ("before", "after")]
    assert shown("accuracy") == [f"{RESULTS[name]['accuracy']:.4f}" for name in ("dense", "pruned")]


@ONE
def test_what_was_found_of_other_weights_is_not_shown(small):
    model = AutoModelForSequenceClassification.from_pretrained(small)
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    proof = (small / PROOF_FILE).read_text()
    save_pretrained(model, small.parent / "again")
    for name in ("model.safetensors", PROOF_FILE):
        shutil.copy(small.parent / "again" / name, small / name)
    assert "Neither evaluated nor measured yet" in write_card(small).read_text()
    assert EVALUATION not in (small / "README.md").read_text()
    assert proof != (small / PROOF_FILE).read_text()


@ONE
def test_each_model_of_a_comparison_gets_its_own_figures(small):
    other = small.parent / "other"
    shutil.copytree(small, other)
    found = json.loads((small / MEASUREMENTS).read_text())
    slow = [{**at, "median_ms": 9 * at["median_ms"], "p90_ms": 9 * at["p90_ms"]} for at in found["small"]["latency"]]
    found = {
        "dense": found["dense"],
        "a": {**found["small"], "weights": "others", "latency": slow},
        "b": found["small"],
    }
    write(found, other)
    milliseconds = f"{found['b']['latency'][0]['median_ms']:.1f} ms"
    assert milliseconds in write_card(other).read_text()
    write({"b": found["b"], "dense": found["dense"]}, other)  # the pruned one first: nothing to compare it with
    assert "Not measured" in write_card(other).read_text()


def test_nothing_was_cut(tmp_path):
    model = tiny_model("bert")
    prune(model, [tiny_batch(model, 64)], PruningConfig(keep=1.0, calibration_samples=64, sequence_length=12))
    save_pretrained(model, tmp_path / "whole")
    assert "100% of its multiply-adds" in write_card(tmp_path / "whole").read_text()


@ONE
def test_a_model_cut_twice_is_shown_beside_the_dense_one(small):
    model = AutoModelForSequenceClassification.from_pretrained(small)
    given = {"keep": 0.7, "shapes": "per_layer", "align": 4, "calibration_samples": 64, "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(**given))
    save_pretrained(model, small.parent / "twice")
    text = write_card(small.parent / "twice").read_text()
    dense = json.loads((small / PLAN_FILE).read_text())["cost"]["before"]["macs_model"]
    assert f"| multiply-adds | {count(dense)} |" in text
    assert "in 2 cuts" in text


def test_the_lines_that_open_it_do(small, monkeypatch):
    text = write_card(small).read_text()
    monkeypatch.chdir(small.parent)
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    shapes = json.loads((small / "config.json").read_text())["hf_prune"]["shapes"]
    assert ("import hf_prune" in code) == (shapes != "stock")
    exec(code.split("pipe =")[0], {})


@ONE
def test_without_measurements_it_says_so(small):
    for name in (EVALUATION, MEASUREMENTS):
        (small / name).unlink()
    text = write_card(small).read_text()
    assert "Neither evaluated nor measured yet" in text
    assert "Not measured: `hf-prune bench" in text
    assert "model-index" not in text


@ONE
@pytest.mark.parametrize(
    ("engine", "packages", "reason"),
    [
        ("onnxruntime", ["onnxruntime", "onnxscript"], "needs hf-prune[onnx]"),
        ("torchao", ["torchao"], "needs hf-prune[torchao]: make test-torchao"),
    ],
)
def test_int8_is_shown_where_it_was_measured(small, engine, packages, reason):
    for package in packages:
        pytest.importorskip(package, reason=reason)
    models = [AutoModelForSequenceClassification.from_pretrained(small.parent / name) for name in ("dense", "small")]

    def quality(call):
        ids = torch.arange(8, 24).reshape(2, 8)
        given = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}  # as its tokenizer
        logits = call(input_ids=ids, **given).logits
        assert logits.shape == (2, 2)
        return {"accuracy": float(logits[0].softmax(-1)[0])}

    found = compare_int8(*models, quality, engine=engine, shapes=((1, 8),), runs=2)
    sizes = {name: model["bytes"] for name, model in found["models"].items()}
    assert sizes["pruned INT8"] < sizes["dense INT8"] < sizes["dense"]
    assert sizes["pruned INT8"] < sizes["pruned"]
    write_int8([found], small)
    text = write_card(small).read_text()
    assert "## With INT8" in text
    assert f"| pruned INT8 | {found['models']['pruned INT8']['metrics']['accuracy']:.4f} |" in text
    assert "(pictures/tradeoff.png)" in text


def test_a_directory_that_is_not_pruned(tmp_path):
    with pytest.raises(ValueError, match="holds no pruned checkpoint"):
        write_card(Path(tmp_path))


def test_a_trainer_writes_the_card_with_what_it_evaluated(tmp_path):
    run = training.trainer(tmp_path / "out")
    data = training.rows(run.model)
    before = run.evaluate(data)["eval_loss"]
    run.train()
    after = run.evaluate(data)["eval_loss"]
    run.save_model(str(tmp_path / "small"))
    found = json.loads((tmp_path / "small" / EVALUATION).read_text())
    assert found["results"] == {"dense": {"loss": before}, "pruned": {"loss": after}}
    assert found["rows"] == len(data)
    text = (tmp_path / "small" / "README.md").read_text()
    assert f"loss {after:.4g} (dense {before:.4g})" in text
    assert "\n# small\n" in text
    assert 'from_pretrained("small")' in text


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft
@pytest.mark.parametrize(
    ("rate", "given"), [(0.05, {}), (2.0, {"peft_config": LoraConfig(target_modules=["query", "value"])})]
)
def test_the_best_model_has_its_own_figures(tmp_path, rate, given):
    args = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8, "load_best_model_at_end": True}
    args = {**args, "save_strategy": "steps", "learning_rate": rate}
    model = tiny_model("bert")
    run = training.trainer(tmp_path / "out", model=model, args=args, eval_dataset=training.rows(model), **given)
    run.train()
    assert run.state.best_global_step < 8
    run.save_model(str(tmp_path / "small"))
    found = json.loads((tmp_path / "small" / EVALUATION).read_text())["results"]["pruned"]["loss"]
    assert found == pytest.approx(run.state.best_metric)
    assert found == pytest.approx(run.evaluate()["eval_loss"], rel=1e-4)


def test_a_resumed_run_has_the_same_card(tmp_path):
    run = training.trainer(tmp_path / "out", args={"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    run.train()
    run.save_model(str(tmp_path / "first"))
    again = training.trainer(tmp_path / "out", args={"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    again.train(resume_from_checkpoint=True)
    again.save_model(str(tmp_path / "second"))
    cards = [(tmp_path / name / "README.md").read_text().replace(name, "") for name in ("first", "second")]
    assert cards[0] == cards[1]
    assert "in one cut, calibrated on 32 examples" in cards[0]


def test_a_trainer_that_evaluated_nothing_says_so(tmp_path):
    run = training.trainer(tmp_path / "out")
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert "Neither evaluated nor measured yet" in (tmp_path / "small" / "README.md").read_text()
