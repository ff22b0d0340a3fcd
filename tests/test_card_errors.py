"""The card: strings from elsewhere stay strings in it, and files that were edited give one sentence and no card."""

from __future__ import annotations

import ast
import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_batch, tiny_model

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.checkpoint.history import PLAN_FILE, REPORT_FILE
from hf_prune.checkpoint.proof import weights_id
from hf_prune.cli.main import main
from hf_prune.report import plots
from hf_prune.report.card import write_card
from hf_prune.report.engines import checkpoint_rows, opening_lines
from hf_prune.report.evidence import EVALUATION, write_evaluation
from hf_prune.report.int8 import INT8_FILE
from hf_prune.report.measure import compare
from hf_prune.report.quote import fenced, quoted
from hf_prune.report.render import MEASUREMENTS, write
from hf_prune.report.table import markdown

RESULTS = {"dense": {"accuracy": 0.8125}, "pruned": {"accuracy": 0.7969}}
HOSTILE = {
    "html": "<script>alert(1)</script>",
    "an image": '<img src=x onerror="alert(1)">',
    "a fence": "x\n```\n# injected\n```python\nimport os",
    "a long fence": "``````\n# injected",
    "lines": "first\n\n# injected\n\n- injected",
    "carriage returns": "first\r\r# injected",
    "a table": "a | b |\n| injected | c",
    "a link": "[click](https://evil.example) ![x](https://evil.example/x.png)",
    "yaml": 'x"\ntags: [injected]\n---\n# injected',
    "more yaml": "&a [*a, !!python/object/apply:os.system ['ls']]",
    "front matter": "\n---\n# injected\n---\n",
    "quotes": '"); import os; os.system("injected',
    "a backslash": 'x\\"); injected = 1 #\\',
    "code": "`x` injected `",
    "a template": "{{ 7 * 7 }}{% raw %}",
    "a formula": "$x^{$ and $\\frac$",
    "control characters": "x\x00\x1b[31m\u2028# injected",
    "no character": "x\udcff",
    "long": "x" * 3000,
    "empty": "",
    "markup": "[/red][bold]x",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = tiny_model("bert")
    given = {"keep": 0.8, "shapes": "per_layer", "align": 4, "calibration_samples": 64, "sequence_length": 12}
    prune(model, [tiny_batch(model, 64)], PruningConfig(**given))
    home = tmp_path_factory.mktemp("made") / "small"
    save_pretrained(model, home)
    write_evaluation(home, RESULTS, dataset="me/reviews", split="test", rows=64, command="a script")
    write(compare({"dense": tiny_model("bert"), "small": home}, shapes=((1, 8),), runs=2, warmup=0), home)
    return home


@pytest.fixture
def home(made, tmp_path):
    return shutil.copytree(made, tmp_path / "small")


@pytest.fixture
def without_pictures(monkeypatch):
    monkeypatch.setattr(plots, "can_draw", lambda: False)


def edit(home, name, change):
    found = json.loads((home / name).read_text())
    changed = change(found)
    (home / name).write_text(json.dumps(found if changed is None else changed))


def hostile(home, text):
    """The text wherever a file beside the weights has one."""

    def config(found):
        found["hf_prune"] |= {"base_model": text, "version": text, "criterion": text, "license": text, "repair": text}

    def plan(found):
        found["config"] |= {"keep": text, "criterion": text, text: text}

    def report(found):
        found["cuts"][-1]["config"] |= {"criterion": text, "units": [text], text: text}
        found["cuts"][-1]["criterion"] = text
        for site in found["cuts"][-1]["scores"]:
            site["stack"] = text

    def evaluation(found):
        values = {text: 0.5, "loss": 0.25}
        results = {"dense": values, "pruned": values}
        return {**found, "dataset": text, "split": text, "command": text, "results": results}

    def measurements(found):
        pruned = found["small"]
        for model in found.values():
            model["latency"][0]["what"] = text
            model["settings"] |= dict.fromkeys(("dtype", "device_name", "attention", "torch", "transformers"), text)
        return {text: found["dense"], f"{text} small": {**pruned, "notes": [text]}}

    for name, change in (
        ("config.json", config), (PLAN_FILE, plan), (REPORT_FILE, report), (EVALUATION, evaluation),
        (MEASUREMENTS, measurements),
    ):  # fmt: skip
        edit(home, name, change)
    row = {"bytes": 9, "metrics": {text: 0.5}, "latency": [{"batch": 1, "length": 8, "median_ms": 1.0, "runs": 2,
           "speedup": 1.0, "what": text}]}  # fmt: skip
    engine = {"engine": text, "instructions": text, "device": text, "threads": 1}
    models = {"dense": row, text or "other": row, "pruned": row}
    written = {"weights": weights_id(home), "engines": [{**engine, "models": models}]}
    (home / INT8_FILE).write_text(json.dumps(written))


def outside_code(text):
    """A card's Markdown without its metadata, its blocks and lines of code."""
    body = text.split("\n---\n", 1)[1]
    body = re.sub(r"^(`{3,})[^\n]*\n.*?\n\1$", "", body, flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", body))


def blocks(text, language):
    return [found.group(2) for found in re.finditer(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.M | re.S)]


@pytest.mark.filterwarnings("ignore:.*(Glyph|constrained_layout|legend)")  # matplotlib's, of what a font has not
@pytest.mark.parametrize("where", ["files", "arguments"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_string_from_elsewhere_stays_a_string(home, kind, where, request):
    text = HOSTILE[kind]
    if kind != "a formula" or where == "arguments":
        request.getfixturevalue("without_pictures")
    if where == "files":
        hostile(home, text)
        card = write_card(home).read_text()
    else:
        fields = {"license": text or None, "datasets": [text], "tags": [text], "language": text or None}
        card = write_card(home, name=text or None, base_model=text, note=text, **fields).read_text()
    prose = outside_code(card)
    assert not re.search(r"<\w", prose), "HTML"
    assert not re.search(r"\]\((?!pictures/)", prose), "a link"
    assert not re.search(r"^(#|-)+ injected", prose, re.M)
    assert {line.strip("# ") for line in prose.splitlines() if line.startswith("## ")} <= {
        "Open it", "Speed", "With INT8", "What was kept", "How it was made", "Limits", "Where the numbers come from",
    }  # fmt: skip
    assert len({line.count("|") for line in prose.split("\n\n## ")[0].splitlines() if line.startswith("| ")}) <= 2
    data = ModelCard(card).data.to_dict()
    assert data["tags"][:3] == ["pruned", "structured-pruning", "hf_prune"]
    assert "injected" not in data["tags"]
    (code,) = blocks(card, "python")
    assert len(code.splitlines()) <= 5
    assert {type(node).__name__ for node in ast.parse(code).body} == {"Import", "ImportFrom", "Assign"}
    (recipe,) = blocks(card, "yaml")
    assert set(yaml.safe_load(recipe)) == {"base_model", "pruning", "plan"}


@pytest.mark.parametrize("kind", HOSTILE)
def test_quoting_keeps_the_words(kind):
    text = HOSTILE[kind]
    shown = quoted(text)
    assert "\n" not in shown
    assert "<" not in shown
    (found,) = re.findall(r"^`{3,}\n(.*)\n`{3,}$", fenced(text), re.S)
    assert found == text
    cells = markdown([{"a": text, "b": "x"}, {"a": "y", "b": text}]).splitlines()
    assert len(cells) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in cells} == {3}


@pytest.mark.parametrize("kind", HOSTILE)
def test_the_lines_that_open_it_are_python(made, kind):
    name = HOSTILE[kind]
    lines = opening_lines(made, name)
    tree = ast.parse("\n".join(lines))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert (name or str(made)).encode(errors="replace").decode() in strings
    assert len(tree.body) == len(lines)


# --- files that were edited ------------------------------------------------------------------------------------------


def put(*path, value):
    def change(found):
        for key in path[:-1]:
            found = found[key]
        found[path[-1]] = value

    return change


LATENCY = ("small", "latency", 0)
EDITS = {
    EVALUATION: [
        put("results", value=[]), put("results", value="good"), put("results", "pruned", value=3),
        put("results", "pruned", "accuracy", value="high"), put("results", "pruned", "accuracy", value=[1]),
        put("results", "dense", value=7), lambda found: found.pop("dataset") and None,
        put("rows", value="many"),
    ],
    MEASUREMENTS: [
        put("small", value=3), put("small", "latency", value=4), put("small", "settings", value={}),
        put(*LATENCY, "median_ms", value="fast"), put(*LATENCY, "speedup", value=0),
        put(*LATENCY, "speedup", value=None),
        put("small", "notes", value=5), put("dense", "bytes", value="big"), put("dense", value=[]),
        lambda found: found["dense"].pop("latency") and None,
    ],
    REPORT_FILE: [
        put("cuts", value=[{}]), put("cuts", value=[3]), put("cuts", value="one"),
        put("cuts", 0, "calibration", value=9),
        put("cuts", 0, "calibration", value={"rows": "x", "tokens": "y"}), put("cuts", 0, "scores", value=[1]),
        put("cuts", 0, "config", value=3),
    ],
    "config.json": [
        put("hf_prune", "before", value=3), put("hf_prune", "before", value={}),
        put("hf_prune", "after", "macs_model", value="few"), put("hf_prune", "before", "macs_model", value=0),
        put("hf_prune", value=[3]), put("hf_prune", "format", value=9), put("architectures", value=["os.system"]),
        put("architectures", value=None), put("architectures", value=[]), put("architectures", value=["pipeline"]),
        put("model_type", value=3), put("model_type", value="llama"),
    ],
    PLAN_FILE: [
        put("kept", value=[]), put("kept", 0, "kept", value=[0]), put("kept", 0, "kept", value=["x"]),
        put("kept", 0, "of", value=-1), put("format", value=7), put("model_type", value="gpt2"),
        put("cost", value=None),
        put("config", value=[1]),
    ],
    INT8_FILE: [lambda _: {"weights": "", "engines": 3}],
}  # fmt: skip
CASES = [(name, number) for name, changes in EDITS.items() for number in range(len(changes))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name} {number}" for name, number in CASES])
def test_an_edited_file_gives_one_sentence_and_no_card(home, name, number, without_pictures, capsys):
    if name == INT8_FILE:
        (home / name).write_text(json.dumps({"weights": weights_id(home), "engines": 3}))
    else:
        edit(home, name, EDITS[name][number])
    before = sorted(path.name for path in home.rglob("*"))
    try:
        write_card(home)
    except ValueError as error:
        said = str(error)  # of the two ends the other is checked below
        assert len(said.split()) > 5
        assert ".json" in said
    else:
        text = (home / "README.md").read_text()
        assert "% of its multiply-adds" in text
        assert "nan" not in text.split("---\n", 2)[2]
        (home / "README.md").unlink()
    assert sorted(path.name for path in home.rglob("*")) == before
    code = main(["card", str(home)])
    assert code in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [EVALUATION, MEASUREMENTS, INT8_FILE, REPORT_FILE, PLAN_FILE, "config.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", '"text"', "\udcff"], ids=repr)
def test_a_file_that_is_no_mapping_is_named(home, name, content, without_pictures):
    (home / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(name)):
        write_card(home)
    assert not (home / "README.md").exists()


@pytest.mark.parametrize(
    "given", [{"name": 3}, {"base_model": ["x"]}, {"note": 5}, {"name": b"x"}, {"base_model": 1.5}], ids=str
)
def test_arguments_that_are_no_words(home, given, without_pictures):
    with pytest.raises(TypeError, match="are words, got"):
        write_card(home, **given)


@pytest.mark.parametrize(
    "name", [["os.system"], [], None, "x", 3, ["pipeline"], [3], ["BertConfig"], {"a": 1}], ids=str
)
def test_bogus_architectures_are_told_at_every_door(home, name, without_pictures, capsys):
    edit(home, "config.json", put("architectures", value=name))
    for door in (checkpoint_rows, opening_lines, write_card):
        with pytest.raises(ValueError, match=r"names the class .* which transformers has not"):
            door(home)
    for command in ("card", "inspect"):
        assert main([command, str(home)]) == 2
        assert "names the class" in capsys.readouterr().err
