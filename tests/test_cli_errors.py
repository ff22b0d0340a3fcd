"""Bad command lines: one line says what is wrong, the exit code is 2, and nothing is written.

The tables run in one directory of tiny models and files, some of them broken, and name them by relative paths.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_text
import torch

from hf_prune.cli import inspect
from hf_prune.cli.main import main

NOISE = random.Random(0).randbytes(2000)
CUT = "--calibration-samples 64 --sequence-length 16 --align 1 --keep 0.9"
CLASSIFICATION = Path(__file__).parent.parent / "examples/classification.py"


def with_config(**changes):
    def change(home):
        path = home / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def with_file(name, content):
    return lambda home: (home / name).write_bytes(content) if content is not None else (home / name).unlink()


BROKEN = {  # a model's directory, as it was damaged
    "config-half": with_file("config.json", b'{"model_type": '),
    "config-empty": with_file("config.json", b""),
    "config-list": with_file("config.json", b"[1, 2]"),
    "config-binary": with_file("config.json", b"\xff\xfe\x00\x80"),
    "config-no-type": with_file("config.json", b"{}"),
    "type-unknown": with_config(model_type="weird"),
    "type-number": with_config(model_type=3),
    "class-none": with_config(architectures=None),
    "class-gone": with_config(architectures=["Gone"]),
    "class-text": with_config(architectures="BertModel"),
    "class-number": with_config(architectures=3),
    "class-no-model": with_config(architectures=["AutoConfig"]),
    "class-another": with_config(architectures=["LlamaForCausalLM"]),
    "heads-uneven": with_config(num_attention_heads=7),
    "size-text": with_config(hidden_size="32"),
    "size-negative": with_config(hidden_size=-32),
    "weights-gone": with_file("model.safetensors", None),
    "weights-noise": with_file("model.safetensors", NOISE),
    "weights-empty": with_file("model.safetensors", b""),
    "tokenizer-half": with_file("tokenizer.json", b"{"),
    "tokenizer-binary": with_file("tokenizer.json", b"\xff\xfe\x80"),
    "tokenizer-gone": with_file("tokenizer.json", None),
}
FILES = {  # data and recipes
    "file": b"x",
    "full/mine.txt": b"mine",
    "results/keep-0.8/config.json": b"{}",
    "empty.csv": b"",
    "noise.csv": NOISE,
    "noise.jsonl": NOISE,
    "noise.parquet": NOISE,
    "noise.txt": NOISE,
    "head.csv": b"text,label\n",
    "ragged.csv": b"text,label\n" + b"w1,1,2,3\n" * 20 + b"w1\n" * 5,
    "label.csv": b"label\n" + b"1\n" * 30,
    "unnamed.csv": b"a,b,label\n" + b"w1,w2,1\n" * 30,
    "text.docx": b"x",
    "number.json": b"3",
    "nothing.json": b"[]",
    "blank.txt": b"\n\n\n",
    "foreign.txt": b"hello world foo bar baz\n" * 300,
    "list.yaml": b"- a",
    "half.yaml": b"a: [b",
    "binary.yaml": b"\xff\xfe\x00\x81",
    "empty.yaml": b"",
    "number.yaml": b"script: 3",
    "null.yaml": b"script:",
    "gone.yaml": b"script: nowhere.py",
    "home.yaml": b"script: .",
    "text.yaml": b"script: file",
    "idle.py": b"x = 1",
    "idle.yaml": b"script: idle.py",
    "syntax.py": b"def (",
    "syntax.yaml": b"script: syntax.py",
    "good.yaml": (
        f"script: {CLASSIFICATION}\nmodel_name: bert\noutput_dir: out\n"
        "train_file: rows.jsonl\nvalidation_file: rows.jsonl\n"
    ).encode(),
}
LABELS = {  # labels row by row
    "from-one": lambda i: i % 2 + 1,
    "fractions": lambda i: i / 60,
    "one-missing": lambda i: None if i == 7 else i % 2,
    "negative": lambda i: -1,
    "ignored": lambda i: -100,
    "words": lambda i: "great",
    "digits": lambda i: str(i % 2),
    "huge": lambda i: 10**12,
    "lists": lambda i: [i % 2],
    "mappings": lambda i: {"a": 1},
    "nan": lambda i: float("nan"),
}
TEXTS = {"blank": "", "null": None, "foreign": "hello world", "numbers": 3, "lists": ["w1"]}  # in every row


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    home = tmp_path_factory.mktemp("room")
    bert = tiny_text.checkpoint(home / "bert", "bert")
    for name, (family, class_name, changes) in {
        "llama": ("llama", None, {}),
        "t5": ("t5", None, {}),
        "qa": ("bert", "BertForQuestionAnswering", {}),
        "roberta": ("roberta", None, {}),
        "regression": ("bert", None, {"num_labels": 1}),
        "fewer-words": ("bert", None, {"vocab_size": 40}),
        "no-pad": ("gpt2", "GPT2ForSequenceClassification", {"pad_token_id": None}),
    }.items():
        tiny_text.checkpoint(home / name, family, class_name, **changes)
    for family in ("bert", "llama", "t5", "gpt2"):
        tiny.tiny_model(family).save_pretrained(home / f"bare-{family}")
    tiny.tiny_model("vit").save_pretrained(home / "vit")
    for name, damage in BROKEN.items():
        shutil.copytree(bert, home / name)
        damage(home / name)
    for name, content in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(content)
    (home / "empty").mkdir()
    texts = tiny_text.sentences(60)
    tiny_text.labelled(home / "rows.jsonl")
    (home / "text.txt").write_text("\n".join(tiny_text.sentences(300)))
    for name, label in LABELS.items():
        tiny_text.write_jsonl(
            home / f"label-{name}.jsonl", [{"text": t, "label": label(i)} for i, t in enumerate(texts)]
        )
    for name, text in TEXTS.items():
        tiny_text.write_jsonl(home / f"text-{name}.jsonl", [{"text": text, "label": i % 2} for i in range(60)])
    tiny_text.write_jsonl(home / "chat.jsonl", [{"messages": [{"said": "w1"}]} for _ in range(60)])
    return home


@pytest.fixture(autouse=True)
def inside(room, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(room)


def written(room):
    """All files with their times, but for the bytecode that Python keeps beside a script that it imports."""
    return {path: path.stat().st_mtime_ns for path in room.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def refused(line, problem, capsys, room):
    """Exit code 2, one line that names the problem, and nothing written."""
    before = written(room)
    try:
        code = main(shlex.split(line))
        usage = False
    except SystemExit as stop:  # argparse, after the usage
        code, usage = stop.code, True
    shown = capsys.readouterr().err
    assert code == 2, shown
    lines = shown.rstrip("\n").split("\n")
    assert usage or (len(lines) == 1 and lines[0].startswith("error: ")), shown
    assert problem in lines[-1]
    assert "Traceback" not in shown
    assert len(lines[-1]) < 900
    assert written(room) == before


USAGE = [
    ("", "required: COMMAND"),
    ("nonsense", "invalid choice: 'nonsense'"),
    ("prune", "required: MODEL, --data"),
    ("prune bert", "required: --data"),
    ("inspect", "required: MODEL"),
    ("train", "required: RECIPE"),
    ("bench", "required: MODEL"),
    ("export bert", "required: --to, --out"),
    ("card", "required: DIR"),
    ("push", "required: DIR, REPO"),
    ("push bert", "required: REPO"),
    ("demo --nope", "unrecognized arguments: --nope"),
    ("inspect bert --task summarization", "invalid choice: 'summarization'"),
    ("inspect bert --dtype int8", "invalid choice: 'int8'"),
    ("inspect bert --sequence-length a", "invalid int value: 'a'"),
    ("export bert --to tflite --out x", "invalid choice: 'tflite'"),
    ("export llama --to gguf --type q4 --out x", "invalid choice: 'q4'"),
    *(
        (f"prune bert --data rows.jsonl {flags}", problem)
        for flags, problem in (
            ("--keep ''", "'': give numbers, 0 < keep <= 1, separated by commas"),
            ("--keep a", "'a': give numbers"),
            ("--keep 0.5,", "'0.5,': give numbers"),
            ("--keep '0.9;0.8'", "give numbers"),
            ("--keep 50%", "give numbers"),
            ("--keep 0.95,0.9,0.95", "has 0.95 twice"),
            ("--keep 0.9000001,0.9000002", "has 0.9 twice (to six digits)"),
            ("--out ''", "the path is empty"),
            ("--out file", "file is a file; name a directory"),
            ("--out file/x", "file is a file; name a directory"),
            ("--keep 0.9,0.8 --out file", "file is a file"),
            ("--criterion snip", "invalid choice: 'snip'"),
            ("--shapes any", "invalid choice: 'any'"),
            ("--metric flops", "invalid choice: 'flops'"),
            ("--scope layer", "invalid choice: 'layer'"),
            ("--repair magic", "invalid choice: 'magic'"),
            ("--allocation x", "invalid choice: 'x'"),
            ("--preset nobody", "invalid choice: 'nobody'"),
            ("--align 1.5", "invalid int value: '1.5'"),
            ("--calibration-samples 1e3", "invalid int value: '1e3'"),
            ("--calibration-seed x", "invalid int value: 'x'"),
            ("--recovery 3", "unrecognized arguments"),
        )
    ),
    *(
        (f"bench bert {flags}", problem)
        for flags, problem in (
            ("--batch 0", "'0' is no whole number of at least 1"),
            ("--batch a", "'a' is no whole number"),
            ("--batch -1", "'-1' is no whole number"),
            ("--batch 1e9", "'1e9' is no whole number"),
            ("--batch ''", "'' is no whole number"),
            ("--batch 1,", "'' is no whole number"),
            ("--length 0", "'0' is no whole number"),
            ("--length 8.5", "'8.5' is no whole number"),
            ("--runs 0", "'0' is no whole number of at least 1"),
            ("--runs -1", "'-1' is no whole number"),
            ("--new-tokens -1", "'-1' is no whole number of at least 0"),
            ("--out file", "file is a file; name a directory"),
            ("--out ''", "the path is empty"),
        )
    ),
    ("demo --out file", "file is a file; name a directory"),
    ("demo --cache file", "file is a file; name a directory"),
    ("demo --out ''", "the path is empty"),
    ("export llama --to gguf --out ''", "the path is empty"),
]
MODELS = [
    *((f"inspect {name}", "no directory with a config.json") for name in
      ("''", "a/b/c", "./none", "empty", "file", "/")),
    *((f"inspect {name}", f"'{name}' cannot be read as a model") for name in ("no/model", "nomodel")),
    ("inspect 'bad name!'", "'bad name!' cannot be read as a model: Repo id must use alphanumeric chars"),
    *((f"inspect config-{name}", f"'config-{name}' cannot be read as a model") for name in
      ("half", "empty", "list", "binary", "no-type")),
    ("inspect type-unknown", "model type `weird`"),
    ("inspect type-number", "'type-number' cannot be read as a model"),
    ("inspect class-none", "names the class None, which is no model of transformers. Say the task"),
    ("inspect class-gone", "names the class 'Gone'"),
    ("inspect class-text", "class-text"),
    ("inspect class-number", "class-number"),
    ("inspect class-no-model", "names the class 'AutoConfig', which is no model"),
    ("inspect class-another", "is of a bert, and names the class LlamaForCausalLM"),
    ("inspect heads-uneven", "not a multiple of the number of attention heads (7)"),
    ("inspect size-text", "hidden_size"),
    ("inspect size-negative", "cannot be read as a bert model"),
    ("inspect weights-gone", "no file named model.safetensors"),
    ("inspect weights-noise", "'weights-noise' cannot be read as a bert model"),
    ("inspect weights-empty", "'weights-empty' cannot be read as a bert model"),
    ("inspect bert --task image-classification", "'bert' cannot be read as a bert model for image-classification"),
    ("inspect bert --task text2text-generation", "'bert' cannot be read as a bert model for text2text-generation"),
    ("inspect bert --device-map nonsense", "found nonsense"),
    ("inspect bert --device-map cuda:77", "'bert' cannot be read as a bert model"),
    ("inspect bert --sequence-length 0", "sequence_length=0: must be at least 1"),
    ("bench bert bert", "the same model twice"),
    ("bench bert no/model", "'no/model' cannot be read as a model"),
    ("bench bert --length 4096", "bert: 4096 tokens, new ones included, are more than its 64 positions"),
    ("bench roberta --length 64 --new-tokens 0", "64 tokens, new ones included, are more than its 63 positions"),
]  # fmt: skip
PRUNE = [  # MODEL, data, flags
    ("bert", "rows.jsonl", "--keep nan", "keep=nan"),
    ("bert", "rows.jsonl", "--keep=-0.5", "keep=-0.5"),
    ("bert", "rows.jsonl", "--keep 0.9,1.5", "keep=1.5"),
    ("bert", "rows.jsonl", "--keep 1e-9", "the least is"),
    ("bert", "rows.jsonl", "--out full", "exists and is not empty"),
    ("bert", "rows.jsonl", "--out .", "current directory"),
    ("bert", "rows.jsonl", "--out /", "current directory"),
    ("bert", "rows.jsonl", "--keep 0.9,0.8 --out full", "full holds more than results (mine.txt)"),
    ("bert", "rows.jsonl", "--keep 0.9,0.8 --out .", "holds more than results"),
    ("bert", "rows.jsonl", "--keep 0.9,0.8 --out results", "keep-0.8 exists and is not empty"),
    ("bert", "rows.jsonl", "--units ''", "units='' is not one of"),
    ("bert", "rows.jsonl", "--units heads,", "units='' is not one of"),
    ("bert", "rows.jsonl", "--units Heads", "units='Heads' is not one of"),
    ("bert", "rows.jsonl", "--metric latency --scope blocks", "whole forward passes are timed"),
    ("bert", "rows.jsonl", "--align 0", "align=0: must be at least 1"),
    ("bert", "rows.jsonl", "--align 100000", "cannot be reached"),
    ("bert", "rows.jsonl", "--calibration-samples 0", "calibration_samples=0: must be at least 8"),
    ("bert", "rows.jsonl", "--calibration-seed -1", "calibration_seed=-1: must be 0 to"),
    ("bert", "rows.jsonl", "--calibration-seed 99999999999999999999999", "must be 0 to 4294967295"),
    ("bert", "rows.jsonl", "--latency-batch-size 0", "latency_batch_size=0"),
    ("bert", "rows.jsonl", "--sequence-length 0", "sequence_length=0"),
    ("bert", "rows.jsonl", "--sequence-length 4096", "sequence_length=4096: this bert has 64 positions"),
    ("roberta", "rows.jsonl", "--sequence-length 64", "this roberta has 63 positions"),
    ("llama", "text.txt", "--sequence-length 4096", "this llama has 64 positions"),
    ("bert", "rows.jsonl", "--metric latency --sequence-length 128", "has 64 positions"),
    ("bert", "rows.jsonl", "--task question-answering", "Text for BertForQuestionAnswering cannot be prepared here"),
    ("qa", "rows.jsonl", "", "Text for BertForQuestionAnswering cannot be prepared here"),
    ("vit", "rows.jsonl", "", "Text for ViTForImageClassification cannot be prepared here"),
    ("bert", "rows.jsonl", "--model-type mistral", "bert weights can be saved as bert"),
    ("bert", "rows.jsonl", "--text-column nope", "no column 'nope'"),
    ("bert", "rows.jsonl", "--text-column label", "Column 'label' holds int (0), not text"),
    ("bert", "rows.jsonl", "--label-column nope", "no column 'nope'"),
    ("bert", "rows.jsonl", "--label-column text", "labels that the model does not know: "),
    ("bert", "rows.jsonl", "--split nowhere", 'Unknown split "nowhere"'),
    ("bert", "rows.jsonl", "--split train[:3]", "gives 3 examples"),
    ("bert", "rows.jsonl", "--split train[:x]", "train[:x]"),
    ("t5", "rows.jsonl", "", "learns from pairs of texts"),
    ("t5", "rows.jsonl", "--label-column label", "Column 'label' holds int"),
    # tokenizers
    ("bare-bert", "rows.jsonl", "", "'bare-bert' has no tokenizer"),
    ("bare-t5", "rows.jsonl", "", "'bare-t5' has no tokenizer"),
    ("bare-gpt2", "text.txt", "", "'bare-gpt2' has no tokenizer"),
    ("bare-llama", "text.txt", "", "'bare-llama' cannot be read as a tokenizer, which the text needs (name another"),
    ("tokenizer-gone", "rows.jsonl", "", "'tokenizer-gone' cannot be read as a tokenizer"),
    ("tokenizer-half", "rows.jsonl", "", "'tokenizer-half' cannot be read as a tokenizer"),
    ("tokenizer-binary", "rows.jsonl", "", "'tokenizer-binary' cannot be read as a tokenizer"),
    ("bert", "rows.jsonl", "--tokenizer no/tokenizer", "'no/tokenizer' cannot be read as a tokenizer"),
    ("bert", "rows.jsonl", "--tokenizer bare-gpt2", "'bare-gpt2' has no tokenizer"),
    ("fewer-words", "rows.jsonl", "", "and the model has 40: it is another model's"),
    ("no-pad", "rows.jsonl", "", "its config names no pad_token_id"),
    ("llama", "foreign.txt", "", "100% of the tokens of foreign.txt are [UNK]"),
    ("bert", "text-foreign.jsonl", "", "of the tokens of text-foreign.jsonl are [UNK]"),
    # data
    ("bert", "''", "", "'' cannot be read as a dataset"),
    ("bert", "nothing.csv", "", "nothing.csv: no such file"),
    ("bert", "no_such_dataset", "", "'no_such_dataset' cannot be read as a dataset"),
    ("bert", "a/b/c", "", "'a/b/c' cannot be read as a dataset"),
    ("bert", "name:part", "", "'name:part' cannot be read as a dataset"),
    ("bert", "empty", "", "'empty' cannot be read as a dataset"),
    ("bert", "empty.csv", "", "empty.csv is empty"),
    ("bert", "head.csv", "", "'head.csv' cannot be read as csv"),
    ("bert", "text.docx", "", "data files end in .csv"),
    *(("bert", f"noise.{end}", "", f"'noise.{end}' cannot be read as {kind}") for end, kind in
      {"csv": "csv", "jsonl": "json", "parquet": "parquet", "txt": "text"}.items()),
    ("bert", "number.json", "", "'number.json' cannot be read as json"),
    ("bert", "nothing.json", "", "'nothing.json' cannot be read as json"),
    ("bert", "label.csv", "", "no text column of a usual name"),
    ("bert", "unnamed.csv", "", "Columns: a, b, label"),
    ("bert", "text.txt", "", "no label column of a usual name"),
    ("bert", "ragged.csv", "", "Column 'label' has no label in 5 of 25 rows, row 21 first"),
    ("llama", "blank.txt", "", "gives 0 examples"),
    ("llama", "chat.jsonl", "", "gives 0 examples"),
    ("bert", "text-blank.jsonl", "", "60 of 60 texts have no token, row 1 first"),
    ("bert", "text-null.jsonl", "", "Column 'text' holds NoneType (None), not text"),
    ("bert", "text-numbers.jsonl", "", "Column 'text' holds int (3), not text"),
    ("bert", "text-lists.jsonl", "", "text"),
    # labels
    ("bert", "label-from-one.jsonl", "", "does not know: 2. They seem to count from 1: subtract 1."),
    ("bert", "label-fractions.jsonl", "", "does not know: 0.01"),
    ("bert", "label-one-missing.jsonl", "", "Column 'label' has no label in 1 of 60 rows, row 8 first"),
    ("bert", "label-negative.jsonl", "", "does not know: -1"),
    ("bert", "label-ignored.jsonl", "", "does not know: -100"),
    ("bert", "label-words.jsonl", "", "does not know: 'great'"),
    ("bert", "label-digits.jsonl", "", "does not know: '0', '1'"),
    ("bert", "label-huge.jsonl", "", "does not know: 1000000000000"),
    ("bert", "label-lists.jsonl", "", "does not know: [0], [1]"),
    ("bert", "label-mappings.jsonl", "", "does not know: {'a': 1}"),
    ("bert", "label-nan.jsonl", "", "label"),
    ("regression", "label-words.jsonl", "", "Column 'label' holds 'great'; the model has one output"),
    ("regression", "label-digits.jsonl", "", "Column 'label' holds '0', '1'"),
    ("regression", "label-lists.jsonl", "", "Column 'label' holds [0], [1]"),
]  # fmt: skip
OTHERS = [
    ("export bert --to gguf --out g", "no row for 'bert'"),
    ("export llama --to gguf --out full", "full is a directory, and GGUF is one file"),
    ("export llama --to gguf --out full --overwrite", "full is a directory"),
    ("export llama --to gguf --out file", "file exists. Choose another name"),
    ("export llama --to gguf --out file/x", "is a file: file/x cannot be made in it"),
    ("export llama --to gguf --out x", "a WordLevel tokenizer is not written"),
    ("export bare-llama --to gguf --out x", "'bare-llama' cannot be read as a tokenizer"),
    ("export bert --to onnx --out full", "exists and is not empty"),
    ("export bert --to onnx --out file", "is a file, and a checkpoint is a directory"),
    ("export bert --to onnx --out .", "current directory"),
    ("export bert --to decilm --out x", "a BertForSequenceClassification is not written; language models of llama"),
    ("export llama --to decilm --out full", "exists and is not empty"),
    ("export llama --to decilm --out file", "is a file, and a checkpoint is a directory"),
    ("export llama --to decilm --int8 --out x", "--int8 goes with --to onnx"),
    ("export bare-llama --to decilm --out x", "'bare-llama' cannot be read as a tokenizer"),
    ("export bare-bert --to onnx --out x", "'bare-bert' has no tokenizer"),
    ("export vit --to onnx --out x", "'vit' cannot be read as a processor of images"),
    ("export bert --to gguf --int8 --out x", "--int8 goes with --to onnx"),
    ("export no/model --to onnx --out x", "'no/model' cannot be read as a model"),
    *((f"card {name}", "holds no pruned checkpoint") for name in ("bert", "empty", "''")),
    ("card nowhere", "nowhere"),
    ("card file", "file"),
    *((f"push {name} me/x", "was never proven to reload") for name in ("bert", "empty")),
    *((f"{command} {name}", problem) for command in ("push", "push --private") for name, problem in
      (("nowhere me/x", "nowhere"), ("file me/x", "file"))),
    *((f"train {name}", "no such recipe") for name in ("nowhere.yaml", ".", "''")),
    *((f"train {name}.yaml", f"{name}.yaml: a recipe is a mapping of arguments, one of them 'script'")
      for name in ("list", "empty", "number", "null")),
    ("train half.yaml", "half.yaml is no YAML"),
    ("train binary.yaml", "binary.yaml is no text"),
    ("train gone.yaml", "nowhere.py, which is not there"),
    ("train home.yaml", "which is not there"),
    ("train text.yaml", "is no Python script"),
    ("train idle.yaml", "idle.py has no main(arguments)"),
    ("train syntax.yaml", "syntax.py is no Python script: invalid syntax"),
    ("train good.yaml --set keep", "--set keep: write key=value"),
    ("train good.yaml --set =3", "--set =3: write key=value"),
    ("train good.yaml --set 'keep=[a'", "--set keep=[a is no YAML"),
    ("train good.yaml --set script=x.py", "x.py, which is not there"),
    ("train good.yaml --set script=3", "/3, which is not there"),
    ("train good.yaml --set keep=2", "keep=2.0: the fraction that remains"),
    ("train good.yaml --set keep=a", "invalid float value: 'a'"),
    ("train good.yaml --set rounds=2.5", "invalid int value: '2.5'"),
    ("train good.yaml --set shapes=any", "invalid choice: 'any'"),
    ("train good.yaml --set nonsense=2", "--nonsense"),
    ("train good.yaml --set temperature=0", "temperature=0.0: must be a finite number above 0"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "problem"), [*USAGE, *MODELS, *OTHERS])
def test_bad_lines(line, problem, capsys, room):
    refused(line, problem, capsys, room)


@pytest.mark.parametrize(("model", "data", "flags", "problem"), PRUNE)
def test_bad_lines_of_prune(model, data, flags, problem, capsys, room):
    refused(f"prune {model} --data {data} {CUT} {flags}", problem, capsys, room)


# --- right results that were wrong -----------------------------------------------------------------------------------


def test_another_tokenizer_stands_in_for_a_missing_one(room, tmp_path):
    line = f"prune tokenizer-gone --data rows.jsonl {CUT} --tokenizer bert --out {tmp_path / 'out'}"
    assert main(shlex.split(line)) == 0
    words = json.loads((tmp_path / "out/tokenizer.json").read_text())["model"]["vocab"]
    assert len(words) == 99


def test_results_of_other_keeps_may_lie_in_out(room, tmp_path):
    (tmp_path / "out/keep-0.7").mkdir(parents=True)
    (tmp_path / "out/keep-0.7/mine.txt").write_text("mine")
    assert main(shlex.split(f"prune bert --data rows.jsonl {CUT} --keep 0.95,0.9 --out {tmp_path / 'out'}")) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"keep-0.7", "keep-0.95", "keep-0.9"}


def test_whole_numbers_written_as_fractions_are_labels(room):
    """As a CSV column with an empty cell somewhere is read."""
    from hf_prune.data.opening import load_model, load_tokenizer
    from hf_prune.data.texts import Source, load_data

    rows = [{"text": text, "label": float(i % 2)} for i, text in enumerate(tiny_text.sentences(60))]
    tiny_text.write_jsonl(room / "floats.jsonl", rows)
    found = load_data(Source("floats.jsonl"), load_model("bert"), load_tokenizer("bert"), 16, 64)
    assert all(batch["labels"].dtype == torch.long for batch in found.calibration)
    (room / "floats.jsonl").unlink()


def test_padding_is_the_models_own(room):
    """A classifier that looks for its own padding to find the last token must not meet another's."""
    from hf_prune.data.opening import load_tokenizer
    from hf_prune.data.texts import Source, load_data

    model = tiny.tiny_model("llama", "LlamaForSequenceClassification", pad_token_id=7)
    for batch in load_data(Source("rows.jsonl"), model, load_tokenizer("bert"), 16, 64).calibration:
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()


def test_models_that_do_not_all_generate_are_timed_at_what_all_do():
    from hf_prune.report.measure import compare

    models = {family: tiny.tiny_model(family) for family in ("bert", "llama")}
    found = compare(models, shapes=[(1, 8)], runs=1, warmup=0, new_tokens=3)
    assert [entry["what"] for model in found.values() for entry in model["latency"]] == ["forward", "forward"]


# --- how a command ends ----------------------------------------------------------------------------------------------


def raising(error):
    def run(options):
        raise error

    return run


def overdrawn():
    """What torch says where there is no memory."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**46)
    return error.value


def ends(error, monkeypatch, *flags):
    monkeypatch.setattr(inspect, "run", raising(error))
    return main(["inspect", "bert", *flags])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("wrong\n  value"), 2, "error: wrong value"),
        (FileNotFoundError("a.txt: no such file"), 2, "error: a.txt: no such file"),
        (ImportError("pip install x"), 2, "error: pip install x"),
        (ValueError(), 2, "error: ValueError"),
        (MemoryError(), 2, "error: no memory left"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "error: no memory left"),
        (overdrawn(), 2, "error: no memory left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_users_are_one_line(error, code, line, monkeypatch, capsys):
    assert ends(error, monkeypatch) == code
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert shown.count("\n") == 1
    with pytest.raises(type(error)):
        ends(error, monkeypatch, "--debug")


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), AttributeError("x"), IndexError("x"), AssertionError("x"), TypeError("x"), RuntimeError("x")],
)
def test_mistakes_of_hf_prune_show_where_they_are(error, monkeypatch):
    with pytest.raises(type(error)):
        ends(error, monkeypatch)


def test_a_sentence_of_our_own_is_one_line_whatever_its_class(room, tmp_path, monkeypatch, capsys):
    """The proof that fails is a RuntimeError; what is handed over wrongly, a TypeError."""
    from hf_prune.checkpoint import proof
    from hf_prune.plan import must_be_plan

    monkeypatch.setattr(proof, "TOLERANCE", dict.fromkeys(proof.TOLERANCE, -1.0))
    assert main(shlex.split(f"prune bert --data rows.jsonl {CUT} --out {tmp_path / 'out'}")) == 2
    assert "does not reproduce" in capsys.readouterr().err
    assert list(tmp_path.glob("out*")) == []
    monkeypatch.setattr(inspect, "run", lambda options: must_be_plan(3))
    assert main(["inspect", "bert"]) == 2
    assert "error: A plan is a PruningPlan, got int" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="pipes as POSIX has them")
def test_a_reader_that_goes_away_ends_it_without_a_traceback(room):
    script = "import os, sys; from hf_prune.cli.main import main; os.close(0); sys.exit(main(['inspect', 'bert']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
