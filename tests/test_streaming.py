"""From file to file: the plan and the weights that prune() gives in memory, and nothing left behind if it stops."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import tiny_text
import torch
from children import forked, signal_of
from hub_server import Hub
from safetensors import safe_open
from tiny import tiny, tiny_batch

from hf_prune import PruningConfig, PruningPlan, analyze, describe, prune, prune_checkpoint, save_pretrained, verify
from hf_prune.checkpoint.shards import check_unchanged, header_of, shards_of, states
from hf_prune.cli.main import main
from hf_prune.model import cut as cutting
from hf_prune.model import offload, shelf

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit", "ignore:.* remains, where keep")
CUT = PruningConfig(keep=0.7, metric="params", shapes="per_layer", align=1)
WIDE = PruningConfig(keep=0.63, metric="params", scope="model", align=1, units=["hidden", "neurons"])
SHARDED = {"max_shard_size": "20KB"}
CASES = {  # class, changes, how it lies in files, the cut
    "one file": ("LlamaForCausalLM", {}, {}, CUT),
    "shards": ("LlamaForCausalLM", {}, SHARDED, CUT),
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, SHARDED, CUT),
    "tied, a narrower stream": ("LlamaForCausalLM", {"tie_word_embeddings": True}, SHARDED, WIDE),
    "bert": ("BertForSequenceClassification", {}, SHARDED, CUT),
    "experts that are fused on loading": ("MixtralForCausalLM", {}, SHARDED, CUT),
}


def saved(home, class_name="LlamaForCausalLM", changes=None, dtype=torch.float32, **how):
    """A tiny checkpoint and the model in it."""
    model = tiny(class_name, **(changes or {})).to(dtype)
    model.save_pretrained(home / "dense", **how)
    return type(model).from_pretrained(home / "dense", dtype=dtype).eval()


def data(model):
    return [tiny_batch(model, batch=16)]


def contents(directory):
    """Every weight of a checkpoint, by name."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it has no __iter__)
    return found


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".json"}


def left(home):
    return sorted(path.name for path in home.iterdir())


# --- the same as in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_same_plan_and_weights_as_in_memory(name, tmp_path):
    class_name, changes, how, config = CASES[name]
    model = saved(tmp_path, class_name, changes, **how)
    found = prune_checkpoint(tmp_path / "dense", data(model), config, out=tmp_path / "small", max_shard_size="15KB")
    wanted = prune(model, data(model), config)
    assert found.plan == wanted.plan
    assert found.report["difference"] == verify(tmp_path / "small") == 0
    save_pretrained(model, tmp_path / "whole")
    there, expected = contents(tmp_path / "small"), contents(tmp_path / "whole")
    assert there.keys() == expected.keys()
    assert all(torch.equal(there[key], expected[key]) for key in expected)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    assert describe(found.model).sizes == describe(model).sizes
    assert all(p.is_meta for p in found.model.parameters())
    assert left(tmp_path) == ["dense", "small", "whole"]


def test_half_precision_stays_and_another_can_be_asked_for(tmp_path):
    model = saved(tmp_path, dtype=torch.bfloat16)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / dtype, dtype=dtype)
        assert {tensor.dtype for tensor in contents(tmp_path / dtype).values()} == {expected}


@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_what_was_pruned_is_pruned_again(shapes, tmp_path):
    """Read by hf_prune's own loader; the plans compose."""
    config = dataclasses.replace(CUT, keep=0.8, shapes=shapes)
    model = saved(tmp_path, "BertForSequenceClassification")
    prune_checkpoint(tmp_path / "dense", data(model), config, out=tmp_path / "once")
    again = type(model).from_pretrained(tmp_path / "once").eval()
    found = prune_checkpoint(tmp_path / "once", data(model), config, out=tmp_path / "twice")
    assert found.plan == prune(again, data(model), config).plan
    save_pretrained(again, tmp_path / "whole")
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "whole")
    assert PruningPlan.load(tmp_path / "twice" / "pruning_plan.json") == again._hf_prune.plan


BY_ID = """
from test_streaming import CUT, data
from tiny import tiny
from hf_prune import prune_checkpoint
import sys
prune_checkpoint("me/dense", data(tiny("LlamaForCausalLM")), CUT, out=sys.argv[1])
"""


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of httpx
def test_by_its_id_on_the_hub(tmp_path):
    """Only what is read is downloaded."""
    model = saved(tmp_path, **SHARDED)
    prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small")
    with Hub() as hub:
        home = {path.name: path.read_bytes() for path in (tmp_path / "dense").iterdir()}
        hub.repos["me/dense"] = {"main": {**home, "pytorch_model.bin": b"0" * 2000}}
        known = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        env = {**known, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", BY_ID, str(tmp_path / "other")]
        done = subprocess.run(command, env=env, cwd=Path(__file__).parent, capture_output=True, text=True)
        hub.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert files_of(tmp_path / "other") == files_of(tmp_path / "small")
    assert not list((tmp_path / "home").rglob("pytorch_model.bin"))


def test_a_plan_is_replayed(tmp_path):
    model = saved(tmp_path)
    plan = analyze(model, data(model), CUT).plan()
    assert prune_checkpoint(tmp_path / "dense", data(model), plan=plan, out=tmp_path / "small").plan == plan


def test_the_source_is_only_read(tmp_path):
    model = saved(tmp_path, **SHARDED)
    before = states((tmp_path / "dense").iterdir())
    prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small")
    assert states((tmp_path / "dense").iterdir()) == before


def test_calibration_states_lie_in_a_file(tmp_path, monkeypatch):
    """Beyond the largest weight, since no weights lie in memory that they could be beside."""
    model, rooms = saved(tmp_path, changes={"num_hidden_layers": 6}), []
    monkeypatch.setattr(shelf, "bytes_in_memory", lambda m: rooms.append(offload.bytes_in_memory(m)) or rooms[-1])
    prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small")
    assert {*rooms} == {0}
    assert offload.bytes_in_memory(model) == sum(4 * p.numel() for p in model.parameters())


def anonymous():
    """Bytes of this process that are no pages of files (which the kernel drops as it needs to)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def peak_of(run):
    """What `anonymous` rises by at most while something runs, sampled by a thread."""
    before, found, done = anonymous(), [], threading.Event()

    def watch():
        while not done.wait(0.002):
            found.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        run()
    finally:
        done.set()
        thread.join()
    return max(found) - before


MEASURED = """
from test_streaming import peak_of, saved
from tiny import tiny_batch
import pathlib, sys, torch
from hf_prune import PruningConfig, prune_checkpoint
torch.set_num_threads(1)
home = pathlib.Path(sys.argv[1])
batch = tiny_batch(saved(home / "first"), batch=16)
config = PruningConfig(keep=0.9, metric="params", units=["neurons"], criterion="fisher", repair="none")
run = lambda home: prune_checkpoint(home / "dense", [batch], config, out=home / "small")
run(home / "first")  # imports what it needs
print(peak_of(lambda: run(home)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells what is anonymous")
def test_the_model_is_never_whole_in_memory(tmp_path):
    """Nor half of it: one layer of 24, its gradients, and what Python needs. (A repair's matrices come on top.)"""
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24}
    whole = offload.bytes_in_memory(saved(tmp_path, changes=size, max_shard_size="20MB"))
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.splitlines()[-1]) < whole / 2


# --- stopped ---------------------------------------------------------------------------------------------------------


def at(number, act):
    """`put_`, which acts behind its n-th call."""
    real, calls = cutting.put_, iter(range(1, 10**6))

    def put(*args, **kwargs):
        real(*args, **kwargs)
        if next(calls) == number:
            act()

    return put


def test_a_killed_run_leaves_its_folder_and_the_next_gives_the_same_bytes(tmp_path, monkeypatch):
    model = saved(tmp_path, **SHARDED)
    (tmp_path / "a").mkdir()
    run = lambda home: prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / home / "small")  # noqa: E731
    run("a")
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "put_", at(6, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        assert signal_of(forked(lambda: run("b"))) == signal.SIGKILL
    (folder,) = (tmp_path / "b").iterdir()
    assert folder.match(".hf_prune-*-stream")
    assert list(folder.iterdir())
    run("b")
    assert left(tmp_path / "b") == ["small"]
    assert files_of(tmp_path / "b" / "small") == files_of(tmp_path / "a" / "small")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_stopped_run_leaves_nothing(error, tmp_path, monkeypatch):
    model = saved(tmp_path)

    def stop():
        assert list(tmp_path.glob(".hf_prune-*-stream/*"))
        raise error

    monkeypatch.setattr(cutting, "put_", at(6, stop))
    with pytest.raises(error):
        prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small")
    assert left(tmp_path) == ["dense"]


def test_one_run_at_a_time(tmp_path, monkeypatch):
    model = saved(tmp_path)
    run = lambda: prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small")  # noqa: E731
    monkeypatch.setattr(cutting, "put_", at(6, run))
    with pytest.raises(FileExistsError, match="is being written by another process or thread"):
        run()
    assert left(tmp_path) == ["dense"]


# --- refused ---------------------------------------------------------------------------------------------------------


def refused(home, error, match, config=CUT, **more):
    """An error, and nothing is there that was not."""
    before = left(home)
    batch = [tiny_batch(tiny("LlamaForCausalLM"), batch=16)]
    with pytest.raises(error, match=match):
        prune_checkpoint(more.pop("source", home / "dense"), batch, config, **{"out": home / "small", **more})
    assert left(home) == before


def shard(home, number=1):
    return sorted((home / "dense").glob("model-*.safetensors"))[number]


def test_a_missing_shard(tmp_path):
    saved(tmp_path, **SHARDED)
    shard(tmp_path).unlink()
    refused(tmp_path, FileNotFoundError, r"lacks model-00002-of-0.*\(1 of \d+ shards that .*index\.json names\).*again")


@pytest.mark.parametrize(
    ("size", "match"), [(-1, r"is truncated: its header says [\d,]+ bytes"), (9, "only the start")]
)
def test_a_truncated_shard(size, match, tmp_path):
    saved(tmp_path, **SHARDED)
    whole = shard(tmp_path).read_bytes()
    shard(tmp_path).write_bytes(whole[:size])
    refused(tmp_path, ValueError, f"model-00002-of.*{match}.*Download or copy it again")


def test_an_index_of_another_save(tmp_path):
    saved(tmp_path, **SHARDED)
    shutil.copy(shard(tmp_path, 0), shard(tmp_path, 1))
    refused(tmp_path, ValueError, r"index\.json says that model-00002-of-.* holds .*, and it does not")


@pytest.mark.parametrize("told", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index(told, tmp_path):
    saved(tmp_path, **SHARDED)
    (tmp_path / "dense" / "model.safetensors.index.json").write_text(told)
    refused(tmp_path, ValueError, r"index\.json (has no weight_map|holds a JSON list|is no JSON)")


def test_pickles(tmp_path):
    model = saved(tmp_path)
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    (tmp_path / "dense" / "model.safetensors").unlink()
    refused(tmp_path, FileNotFoundError, r"only pytorch_model\.bin, which cannot be read piece by piece\. Convert it")
    (tmp_path / "dense" / "pytorch_model.bin").unlink()
    refused(tmp_path, FileNotFoundError, r"no model\.safetensors and no .*Give a checkpoint that transformers saved")


def test_out_is_full_or_the_source(tmp_path):
    saved(tmp_path)
    refused(tmp_path, FileExistsError, "exists and is not empty", out=tmp_path / "dense")
    refused(tmp_path, ValueError, "is both the source and `out`", out=tmp_path / "dense", overwrite=True)


def test_overwrite(tmp_path):
    model = saved(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("mine")
    prune_checkpoint(tmp_path / "dense", data(model), CUT, out=tmp_path / "small", overwrite=True)
    assert not (tmp_path / "small" / "mine.txt").exists()


def test_no_room(tmp_path, monkeypatch):
    saved(tmp_path)
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size
    usage = namedtuple("usage", "total used free")
    for part in (1.39, 0.71):  # before anything is opened; of the folder there
        monkeypatch.setattr(shutil, "disk_usage", lambda path, part=part: usage(size, 0, int(part * size)))
        refused(tmp_path, OSError, r"has .* GB left, and pruning into 'small' takes about .* GB there\. Make room")


def test_no_room_for_the_result(tmp_path, monkeypatch):
    """Which is known once the plan is."""
    from hf_prune import streaming

    saved(tmp_path)
    plain, calls = streaming._check_room, []
    monkeypatch.setattr(
        streaming,
        "_check_room",
        lambda target, needed: calls.append(needed) or plain(target, needed * 1e9 ** (len(calls) - 1)),
    )
    refused(tmp_path, OSError, "has .* GB left, and pruning into 'small'")
    assert len(calls) == 2


def test_latency(tmp_path):
    saved(tmp_path)
    timed = PruningConfig(keep=0.7, metric="latency")
    refused(tmp_path, ValueError, r"metric='latency' times the model.*Take metric='macs' or 'params'", timed)
    plan = PruningPlan("llama", (), config=timed.to_dict())
    refused(tmp_path, ValueError, "metric='latency' times the model", plan=plan)


def test_quantised(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    refused(tmp_path, ValueError, r"is quantised, and packed weights cannot be pruned\. Give the checkpoint")


def test_code_of_its_own(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config | own))
    (tmp_path / "dense" / "own.py").write_text("raise SystemExit('it ran')")
    refused(tmp_path, ValueError, "cannot be read as a model.*contains custom code")


def test_what_is_no_source_config_or_device(tmp_path):
    saved(tmp_path)
    refused(tmp_path, FileNotFoundError, "no directory with a config.json", source=tmp_path / "none")
    refused(tmp_path, TypeError, "config is a PruningConfig", 0.5)
    refused(tmp_path, TypeError, "plan", plan=0.5)
    for device in ("auto", "meta"):
        refused(tmp_path, ValueError, f"device='{device}' computes nothing here", device=device)


def test_bad_data_leaves_nothing(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="at least 8"):
        prune_checkpoint(
            tmp_path / "dense", [tiny_batch(tiny("LlamaForCausalLM"), batch=4)], CUT, out=tmp_path / "small"
        )
    assert left(tmp_path) == ["dense"]


def test_weights_that_the_source_lacks(tmp_path):
    saved(tmp_path)
    refused(
        tmp_path,
        ValueError,
        r"lacks score\.weight \(1 weights that a LlamaForSequenceClassification has\)\. Open it as",
        task="text-classification",
    )


@pytest.mark.parametrize("change", [os.utime, os.unlink, lambda path: path.write_bytes(path.read_bytes() + b"0")])
def test_a_source_that_changes(change, tmp_path):
    saved(tmp_path, **SHARDED)
    before = states(shards_of(str(tmp_path / "dense")))
    check_unchanged(before)
    change(shard(tmp_path))
    with pytest.raises(RuntimeError, match=r"model-00002.* changed while.*Nothing was saved\. Prune a copy"):
        check_unchanged(before)


def test_a_source_that_changes_is_not_saved(tmp_path, monkeypatch):
    saved(tmp_path, **SHARDED)
    monkeypatch.setattr(cutting, "put_", at(6, lambda: os.utime(shard(tmp_path))))
    refused(tmp_path, RuntimeError, "changed while the checkpoint was pruned")


def test_headers(tmp_path):
    model = saved(tmp_path)
    assert header_of(tmp_path / "dense" / "model.safetensors").keys() == model.state_dict().keys()
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ValueError, match="is no safetensors file"):
        header_of(tmp_path / "other")


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "text.txt").write_text("\n".join(tiny_text.sentences(300)))
    source = tiny_text.checkpoint(tmp_path / "dense", "llama")
    cut = ["--calibration-samples", "64", "--sequence-length", "16", "--align", "1", "--metric", "params"]
    return ["prune", source, "--data", str(tmp_path / "text.txt"), *cut]


def test_command_line(asked, tmp_path, capsys):
    assert main([*asked, "--keep", "0.8", "--stream", "--out", str(tmp_path / "streamed")]) == 0
    shown = capsys.readouterr()
    assert "saved and proven to reload" in shown.out
    assert "keep=0.8" in shown.out
    assert main([*asked, "--keep", "0.8", "--out", str(tmp_path / "whole")]) == 0
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")
    assert (tmp_path / "streamed" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ([], "give --out"),
        (["--keep", "0.8,0.6", "--out", "small"], "one --keep at a time"),
        (["--dry-run", "--out", "small"], "--dry-run opens the model"),
        (["--model-type", "mistral", "--out", "small"], "--model-type puts all weights"),
        (["--device-map", "auto", "--out", "small"], "device='auto' computes nothing"),
        (["--metric", "latency", "--out", "small"], "metric='latency' times the model"),
    ],
)
def test_command_line_refuses(more, problem, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*asked, "--stream", *more]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
