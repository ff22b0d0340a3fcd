"""Every recipe runs its script, at tiny size, through `hf-prune train`."""

from __future__ import annotations

import doctest
import json
import random
from pathlib import Path

import pytest
import tiny_text
from PIL import Image
from tiny import tiny_model
from transformers import AutoConfig, ViTImageProcessor

from hf_prune.cli import recipe
from hf_prune.cli.main import main

RECIPES = Path(__file__).parent.parent / "recipes"
TINY = {  # what makes a recipe tiny
    "num_train_epochs": 1, "per_device_train_batch_size": 8, "calibration_samples": 32, "align": 4, "use_cpu": True,
    "disable_tqdm": True, "gradient_accumulation_steps": 1, "warmup_steps": 0, "sequence_length": 16,
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tokens to refit"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]


def classification(where):
    tiny_text.checkpoint(where / "model", "bert")
    for part in ("train", "validation"):
        tiny_text.labelled(where / f"{part}.jsonl", 40)
    return {"train_file": "train.jsonl", "validation_file": "validation.jsonl", "max_length": 16}


def causal_lm(where):
    tiny_text.checkpoint(where / "model", "llama")
    for part in ("train", "validation"):
        (where / f"{part}.txt").write_text("\n".join(tiny_text.sentences(120)))
    return {"block_size": 16, "max_steps": 4, "save_steps": 2, "lora_rank": 2}


def question_answering(where):
    tiny_text.checkpoint(where / "model", "bert", "BertForQuestionAnswering")
    draw = random.Random(0)
    for part in ("train", "validation"):
        rows = []
        for text in tiny_text.sentences(40):
            word = draw.choice(text.split())
            answer = {"text": [word], "answer_start": [text.index(word)]}
            rows.append({"question": f"where is {word}", "context": text, "answers": answer})
        tiny_text.write_jsonl(where / f"{part}.jsonl", rows)
    return {"train_file": "train.jsonl", "validation_file": "validation.jsonl", "max_length": 24, "stride": 4}


def image_classification(where):
    tiny_model("vit").save_pretrained(where / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(where / "model")
    for part in ("train", "validation"):
        for label in ("cat", "dog"):
            folder = where / "pictures" / part / label
            folder.mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", (20, 20), (10 * i, 90 * (label == "cat"), 30)).save(folder / f"{i}.png")
    return {"image_folder": "pictures"}


def summarization(where):
    tiny_text.checkpoint(where / "model", "t5")
    for part in ("train", "validation"):
        rows = [{"text": text, "summary": text[: len(text) // 2]} for text in tiny_text.sentences(40)]
        tiny_text.write_jsonl(where / f"{part}.jsonl", rows)
    return {"max_length": 16, "max_summary": 8}


DATA = {
    function.__name__: function
    for function in (classification, causal_lm, question_answering, image_classification, summarization)
}


def test_every_recipe_is_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(DATA)


@pytest.mark.parametrize("name", DATA)
def test_recipe(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {"model_name": "model", **TINY, **DATA[name](tmp_path)}
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", str(RECIPES / f"{name}.yaml"), *words, "--debug"]) == 0
    shown = capsys.readouterr().out
    assert "dense_loss" in shown
    assert "eval_loss" in shown
    given = recipe.read(RECIPES / f"{name}.yaml")
    config = AutoConfig.from_pretrained(given["output_dir"])
    assert config.hf_prune["after"]["macs_model"] < config.hf_prune["before"]["macs_model"]
    metrics = json.loads(Path(given["output_dir"], "all_results.json").read_text())
    assert {"dense_loss", "eval_loss"} <= set(metrics)


def test_the_line_of_a_recipe():
    assert doctest.testmod(recipe).failed == 0


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("- keep", [], "a recipe is a mapping of arguments"),
        ("keep: 0.5", [], "one of them 'script'"),
        ("script: nowhere.py", [], "which is not there"),
        (f"script: {RECIPES.parent}/examples/classification.py", ["keep"], "--set keep: write key=value"),
    ],
)
def test_recipes_that_cannot_be_read(tmp_path, text, changes, message, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert main(["train", str(path), *(word for change in changes for word in ("--set", change))]) == 2
    assert message in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "no such recipe" in capsys.readouterr().err
