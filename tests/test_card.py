"""The model card: what is on it, where its numbers come from, and what it says when there are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import training
from huggingface_hub import ModelCard
from tiny import tiny_batch, tiny_model

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.report.card import EVALUATION, write_card
from hf_prune.report.corners import CORNERS_FILE
from hf_prune.report.measure import compare
from hf_prune.report.render import MEASUREMENTS, write

pytest.importorskip("matplotlib", reason="needs hf-prune[plots]")
RESULTS = {"dense": {"accuracy": 0.8125}, "pruned": {"accuracy": 0.7969}}


@pytest.fixture(params=["per_layer", "uniform", "stock"])
def small(request, tmp_path):
    """A pruned checkpoint with all evidence beside it."""
    dense = tiny_model("bert")
    dense.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: mit\n---\n# dense\n")
    model = type(dense).from_pretrained(tmp_path / "dense")
    given = {"keep": 0.8, "shapes": request.param, "align": 4, "calibration_samples": 64, "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(**given))
    directory = tmp_path / "small"
    save_pretrained(model, directory)
    evaluation = {"dataset": "me/reviews", "split": "test", "rows": 64, "command": "a script", "results": RESULTS}
    (directory / EVALUATION).write_text(json.dumps(evaluation))
    write(compare({"dense": dense, "small": directory}, shapes=((1, 8), (2, 8)), runs=3, warmup=1), directory)
    return directory


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_a_card_is_read_by_the_hub(small):
    card = ModelCard.load(str(write_card(small, base_model="me/dense-bert", name="small-bert")))
    assert card.data.base_model == "me/dense-bert"
    assert card.data.library_name == "transformers"
    assert card.data.datasets == ["me/reviews"]
    assert card.data.pipeline_tag == "text-classification"
    assert "pruned" in card.data.tags
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy (pruned)": 0.7969, "accuracy (dense, before pruning)": 0.8125}
    card.validate  # noqa: B018  # over the network; its YAML was parsed above


def test_the_licence_is_that_of_the_base_model(small):
    assert ModelCard.load(str(write_card(small))).data.license == "mit"
    assert ModelCard.load(str(write_card(small, license="apache-2.0"))).data.license == "apache-2.0"


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
    card = write_card(small)
    known = {n for path in small.glob("*.json") for n in numbers(json.loads(path.read_text()))}
    rows = [line for line in card.read_text().splitlines() if line.startswith("|") and not line.startswith("| :")]
    shown = [float(ms) for row in rows for ms in re.findall(r"([\d.]+) ms", row)]
    shown += [float(v) for row in rows if row.startswith("| accuracy") for v in re.findall(r"0\.\d{4}", row)]
    assert len(shown) > 6
    for number in shown:
        assert any(abs(number - k) <= 0.051 for k in known), number


def test_the_lines_that_open_it_do(small, monkeypatch):
    text = write_card(small).read_text()
    monkeypatch.chdir(small.parent)
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    shapes = json.loads((small / "config.json").read_text())["hf_prune"]["shapes"]
    assert ("import hf_prune" in code) == (shapes != "stock")
    exec(code.split("pipe =")[0], {})


def test_without_measurements_it_says_so(small):
    for name in (EVALUATION, MEASUREMENTS):
        (small / name).unlink()
    text = write_card(small).read_text()
    assert "Neither evaluated nor measured yet" in text
    assert "Not measured: `hf-prune bench" in text
    assert "model-index" not in text


def test_int8_is_shown_where_it_was_measured(small):
    at = {"what": "forward", "batch": 1, "length": 8, "median_ms": 1.5, "speedup": 2.0, "runs": 3}
    model = {"bytes": 10**6, "metrics": {"accuracy": 0.5}, "latency": [at]}
    models = {"dense": model, "pruned INT8": model}
    engine = {"engine": "onnxruntime", "instructions": "avx2", "device": "a CPU", "threads": 2, "models": models}
    (small / CORNERS_FILE).write_text(json.dumps([engine]))
    text = write_card(small).read_text()
    assert "## With INT8" in text
    assert "| pruned INT8 | 0.5000 |" in text


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
    assert f"loss {after:.4g} (dense {before:.4g})" in (tmp_path / "small" / "README.md").read_text()


def test_a_trainer_that_evaluated_nothing_says_so(tmp_path):
    run = training.trainer(tmp_path / "out")
    run.train()
    run.save_model(str(tmp_path / "small"))
    assert "Neither evaluated nor measured yet" in (tmp_path / "small" / "README.md").read_text()
