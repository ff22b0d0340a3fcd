"""The command line: its flags, what it prints and saves, and what it refuses before it starts."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import tiny_text
import transformers

from hf_prune import PruningConfig
from hf_prune.cli.main import main, parser
from hf_prune.config import TRAINING_FIELDS

CUT = ["--calibration-samples", "64", "--sequence-length", "16", "--align", "1"]
FLAGS = {
    "bench": "--batch --compile --debug --help --length --new-tokens --out --runs",
    "card": "--base-model --datasets --debug --help --license --name",
    "export": "--debug --device-map --dtype --help --int8 --out --overwrite --revision --task --to --tokenizer --type",
    "push": "--debug --help --private --revision",
    "demo": "--cache --debug --help --out --quick",
    "inspect": "--debug --device-map --dtype --help --revision --sequence-length --task",
    "check": "--debug --help --revision --task --trust-remote-code",
    "families": "--debug --help --json --markdown --prove --save",
    "prune": (
        "--align --allocation --batch-norm --calibration-samples --calibration-seed --candidates --criterion --data "
        "--debug --device-map --dry-run --dtype --help --keep --label-column --latency-batch-size --layer-criterion "
        "--max-tokens --metric --min-count --model-type --out --overwrite --preset --remote-code --repair --revision "
        "--scope --sequence-length --shapes --split --stream --task --text-column --tokenizer --units --vocabulary"
    ),
    "train": "--debug --help --set",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_text.checkpoint(tmp_path_factory.mktemp("bert") / "m", "bert")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_text.checkpoint(tmp_path_factory.mktemp("llama") / "m", "llama")


@pytest.fixture
def labelled(tmp_path):
    return tiny_text.labelled(tmp_path / "rows.jsonl")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(tiny_text.sentences(300)))
    return str(tmp_path / "text.txt")


def commands():
    (found,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return found.choices


def test_the_interface_is_frozen():
    found = {
        name: " ".join(sorted(flag for action in command._actions for flag in action.option_strings if flag[1] == "-"))
        for name, command in commands().items()
    }
    assert found == FLAGS


def test_every_field_of_the_config_is_a_flag_with_its_help():
    known = {action.dest: action for action in commands()["prune"]._actions}
    for field in fields(PruningConfig):
        if field.name in TRAINING_FIELDS:
            continue
        assert field.metadata["help"] in known[field.name].help.replace("%%", "%")


@pytest.mark.parametrize("command", [[], *([name] for name in FLAGS)])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: hf-prune" in capsys.readouterr().out


def test_flags_become_the_config():
    from hf_prune.cli.prune import pruning_config

    start = ["prune", "m", "--data", "d"]
    given = parser().parse_args([*start, "--units", "heads,neurons", "--metric", "params", "--align", "4"])
    assert pruning_config(given, 0.7) == PruningConfig(keep=0.7, units=["heads", "neurons"], metric="params", align=4)
    given = parser().parse_args([*start, "--preset", "flap", "--shapes", "uniform"])
    assert pruning_config(given, 0.5) == PruningConfig.preset("flap", shapes="uniform", keep=0.5)


def test_prune_classifier(bert, labelled, tmp_path, capsys):
    out = tmp_path / "small"
    assert main(["prune", bert, "--data", labelled, "--keep", "0.7", "--out", str(out), *CUT]) == 0
    shown = capsys.readouterr().out
    assert "accuracy on 24 held-out examples" in shown
    assert "keep=0.7" in shown
    (line,) = re.findall(r'pipeline\("text-classification", "(.*)"\)', shown)
    assert line == str(out)
    pipe = transformers.pipeline("text-classification", line)
    assert pipe("w1 w2 w3")[0]["label"] in ("LABEL_0", "LABEL_1")
    assert pipe.model.config.intermediate_size < 48
    plan = json.loads((out / "pruning_plan.json").read_text())
    assert plan["cost"]["keep"] <= 0.7


def test_prune_language_model(llama, text, tmp_path, capsys):
    out = tmp_path / "small"
    arguments = ["--keep", "0.8", "--metric", "params", "--units", "neurons", "--dtype", "bfloat16", "--out", str(out)]
    assert main(["prune", llama, "--data", text, *arguments, *CUT]) == 0
    assert "perplexity on" in capsys.readouterr().out
    pipe = transformers.pipeline("text-generation", str(out))
    assert pipe.model.dtype == transformers.AutoModelForCausalLM.from_pretrained(out).dtype
    assert str(pipe.model.dtype) == "torch.bfloat16"
    assert pipe("w1 w2", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("w1 w2")


def test_printed_lines_open_what_was_saved(bert, labelled, tmp_path, capsys):
    """Run as printed, in a fresh process: with `import hf_prune`, and from a remote-code checkpoint without it."""
    jobs = []
    for name, extra in (("uniform", []), ("remote", ["--remote-code"])):
        out = tmp_path / name
        arguments = ["--keep", "0.5", "--shapes", "uniform", "--out", str(out), *extra]
        assert main(["prune", bert, "--data", labelled, *arguments, *CUT]) == 0
        lines = capsys.readouterr().out.split(f"# {out}")[1].splitlines()[1:]
        jobs.append("\n".join(line for line in lines if "=" in line or "import" in line))
    assert jobs[0].startswith("import hf_prune")
    assert "hf_prune" not in jobs[1].replace(str(tmp_path), "")
    assert jobs[1].count("trust_remote_code=True") == 2
    for job, before in zip(jobs, ("", "import sys; sys.modules['hf_prune'] = None\n"), strict=True):
        script = f"{before}{job}\nprint(pipe('w1 w2')[0]['label'])"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert "LABEL_" in done.stdout, done.stderr[-2000:]


def test_several_keeps_make_one_table_from_one_pass(bert, labelled, tmp_path, capsys, monkeypatch):
    from hf_prune.score import scoring

    calls = []
    statistics = scoring.statistics
    monkeypatch.setattr(scoring, "statistics", lambda *a, **k: calls.append(1) or statistics(*a, **k))
    arguments = ["--keep", "0.9,0.6,0.75", "--shapes", "per_layer", "--out", str(tmp_path / "out")]
    assert main(["prune", bert, "--data", labelled, *arguments, *CUT]) == 0
    shown = capsys.readouterr().out
    assert len(calls) == 1
    assert shown.count("accuracy") == 2  # the title and one column head: one table
    table = [line for line in shown.splitlines() if line.startswith("│")]
    assert [line.split()[1] for line in table] == ["dense", "keep=0.9", "keep=0.6", "keep=0.75"]
    kept = {keep: json.loads((tmp_path / "out" / f"keep-{keep}" / "pruning_plan.json").read_text()) for keep in
            ("0.9", "0.6", "0.75")}  # fmt: skip
    assert all(plan["cost"]["keep"] <= float(keep) for keep, plan in kept.items())
    assert kept["0.6"]["cost"]["keep"] < kept["0.75"]["cost"]["keep"] < kept["0.9"]["cost"]["keep"]


def test_dry_run_changes_nothing(bert, labelled, tmp_path, capsys, monkeypatch):
    from hf_prune.cli import prune

    opened = []
    original = prune.open_model
    monkeypatch.setattr(prune, "open_model", lambda options: opened.append(original(options)) or opened[-1])
    out = tmp_path / "out"
    arguments = ["--keep", "0.8,0.6", "--shapes", "uniform", "--dry-run", "--out", str(out)]
    assert main(["prune", bert, "--data", labelled, *arguments, *CUT]) == 0
    shown = capsys.readouterr().out
    assert not out.exists()
    for text in (
        "encoder ffn:",
        "of 48 neurons",
        "Time:",
        "Peak memory: about",
        "MACs in blocks",
        "nothing was changed",
    ):
        assert text in shown
    untouched = transformers.AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
    assert all((value == untouched[name]).all() for name, value in opened[0].state_dict().items())


@pytest.mark.parametrize("mode", [["--dry-run"], []])
def test_latency_is_shown_in_milliseconds(mode, bert, labelled, tmp_path, capsys, monkeypatch):
    from hf_prune.decide.latency import clock

    monkeypatch.setenv("HF_PRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(clock, "timed", lambda module, *_, **__: sum(p.numel() for p in module.parameters()) * 1e-6)
    arguments = ["--metric", "latency", "--latency-batch-size", "2", "--keep", "0.9,0.8", "--shapes", "uniform"]
    assert main(["prune", bert, "--data", labelled, *arguments, *CUT, *mode]) == 0
    shown = [int(share) for share in re.findall(r"[\d.]+ ms \((\d+)%\)", capsys.readouterr().out)]
    assert shown[-2] <= 90
    assert shown[-1] <= 80
    assert shown[:-2] == ([100] if mode else [])


def test_nothing_is_saved_without_out(bert, labelled, capsys):
    assert main(["prune", bert, "--data", labelled, "--keep", "0.8", *CUT]) == 0
    assert "Nothing was saved: give --out." in capsys.readouterr().out


def test_another_stock_family_on_request(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--units", "heads", "--keep", "0.9", "--shapes", "uniform", "--model-type", "mistral"]
    assert main(["prune", llama, "--data", text, *arguments, "--out", str(out), *CUT]) == 0
    assert "opens with plain transformers" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["model_type"] == "mistral"


def test_inspect(bert, llama, capsys):
    assert main(["inspect", bert, "--sequence-length", "32"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "4 heads of 8",
        "48 neurons",
        "FFN widths only",
        "at 32 tokens",
        "per_layer",
        "not run in our tests",
    ):
        assert expected in shown
    for column in zip(*re.findall(r"\((\d+\.\d)%\).*\((\d+\.\d)%\)", shown), strict=True):  # parameters, MACs
        assert sum(map(float, column)) == pytest.approx(100, abs=0.25)
    assert main(["inspect", bert, "--sequence-length", "32", "--device-map", "meta"]) == 0
    assert capsys.readouterr().out == shown  # what is read are sizes alone
    assert main(["inspect", llama]) == 0
    shown = capsys.readouterr().out
    assert "4 heads of 8 in 2 KV groups" in shown
    assert "--model-type mistral" in shown


def test_inspect_every_family(family, tmp_path, capsys):
    path = tiny_text.checkpoint(tmp_path / "m", family)
    assert main(["inspect", path, "--sequence-length", "16"]) == 0
    assert f"A stock {family} config can say" in capsys.readouterr().out


def test_inspect_says_what_was_pruned(bert, labelled, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["prune", bert, "--data", labelled, "--keep", "0.8", "--out", out, *CUT])
    assert main(["inspect", out]) == 0
    assert "already pruned: stock form" in capsys.readouterr().out


def test_bench_then_card(bert, labelled, tmp_path, capsys):
    small = str(tmp_path / "small")
    main(["prune", bert, "--data", labelled, "--keep", "0.7", "--out", small, *CUT])
    assert main(["bench", bert, small, "--batch", "1,2", "--length", "8", "--runs", "2", "--out", small]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "small" / "measurements.json").read_text())
    assert [at["batch"] for at in found["small"]["latency"]] == [1, 2]
    assert f"{found['small']['latency'][0]['median_ms']:.1f} ms" in shown
    given = ["--name", "me/small", "--base-model", "me/dense", "--license", "mit", "--datasets", "me/a,me/b"]
    assert main(["card", small, *given]) == 0
    text = (tmp_path / "small" / "README.md").read_text()
    assert f"{found['small']['latency'][0]['median_ms']:.1f} ms" in text
    for expected in ("base_model: me/dense", "license: mit", "- me/b", "\n# small\n", 'from_pretrained("me/small")'):
        assert expected in text
    assert main(["card", bert]) == 2
    assert "holds no pruned checkpoint" in capsys.readouterr().err


def test_export(bert, llama, labelled, tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs hf-prune[onnx]")
    pytest.importorskip("onnxscript", reason="needs hf-prune[onnx]")
    small, graph = str(tmp_path / "small"), str(tmp_path / "graph")
    main(["prune", bert, "--data", labelled, "--keep", "0.7", "--out", small, *CUT])
    assert main(["export", small, "--to", "onnx", "--int8", "--out", graph]) == 0
    assert "run by ONNX Runtime" in capsys.readouterr().out
    assert {"model.onnx", "tokenizer.json"} <= {path.name for path in (tmp_path / "graph").iterdir()}
    assert main(["export", small, "--to", "onnx", "--out", graph]) == 2
    assert main(["export", small, "--to", "gguf", "--out", str(tmp_path / "m.gguf")]) == 2
    assert main(["export", small, "--to", "gguf", "--int8", "--out", str(tmp_path / "m.gguf")]) == 2
    problems = capsys.readouterr().err
    for expected in ("exists and is not empty", "no row for 'bert'", "--int8 goes with --to onnx"):
        assert expected in problems
    pytest.importorskip("gguf", reason="needs hf-prune[gguf]")
    assert main(["export", llama, "--to", "gguf", "--type", "f32", "--out", str(tmp_path / "m.gguf")]) == 2
    assert "a WordLevel tokenizer is not written" in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists()


def test_export_for_vllm(llama, tmp_path, capsys):
    assert main(["export", llama, "--to", "decilm", "--out", str(tmp_path / "deci")]) == 0
    assert "for vLLM with --trust-remote-code; not run by them here" in " ".join(capsys.readouterr().out.split())
    assert {"config.json", "configuration_decilm.py"} <= {path.name for path in (tmp_path / "deci").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--keep", "0"], "0 < keep <= 1"),
        (["--keep", "0.5,1.5"], "keep=1.5"),
        (["--keep", "0.01"], "the least is"),
        (["--units", "wheels"], "'wheels' is not one of heads"),
        (["--units", "heads"], "Allowed in stock shapes: neurons"),
        (["--text-column", "words"], "no column 'words'"),
        (["--split", "nowhere"], "nowhere"),
        (["--model-type", "mistral"], "bert weights can be saved as bert"),
        (["--data", "nothing.csv"], "nothing.csv: no such file"),
        (["--calibration-samples", "3"], "at least 8"),
        (["--device-map", "meta"], "meta device"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(bert, labelled, tmp_path, capsys, arguments, problem):
    out = tmp_path / "out"
    assert main(["prune", bert, "--data", labelled, "--out", str(out), *CUT, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert problem in error
    assert "Traceback" not in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_a_missing_model_or_task_is_named(labelled, tmp_path, bert, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no directory with a config.json" in capsys.readouterr().err
    assert main(["prune", bert, "--data", labelled, "--task", "question-answering"]) == 2
    assert "cannot be prepared here" in capsys.readouterr().err


def test_a_full_output_directory_is_refused_before_the_work(labelled, tmp_path, capsys):
    (tmp_path / "out" / "keep-0.6").mkdir(parents=True)
    (tmp_path / "out" / "keep-0.6" / "mine.txt").write_text("precious")
    arguments = ["--data", labelled, "--keep", "0.8,0.6", "--out", str(tmp_path / "out")]
    assert main(["prune", "no/model", *arguments]) == 2  # the model was never looked for
    assert "exists and is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / "keep-0.6" / "mine.txt").read_text() == "precious"


def test_overwrite_replaces(bert, labelled, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    assert main(["prune", bert, "--data", labelled, "--keep", "0.8", "--out", str(out), "--overwrite", *CUT]) == 0
    assert not (out / "old.txt").exists()
    assert (out / "config.json").exists()


def test_debug_shows_the_traceback(bert):
    with pytest.raises(FileNotFoundError):
        main(["prune", bert, "--data", "nothing.csv", "--debug"])
