"""Pushing over HTTP with the real client, to a Hub on this machine, and opening what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from hub_server import Hub
from tiny import tiny_batch, tiny_model

from hf_prune import PruningConfig, prune, save_pretrained

OPEN = """
import json, os, sys, torch
import hf_prune
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], revision=sys.argv[2]).eval()
ids = torch.arange(8, 24).reshape(2, 8)
with torch.no_grad():
    print(json.dumps(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist()))
"""


@pytest.fixture
def hub():
    with Hub() as server:
        yield server
        server.shutdown()


@pytest.fixture
def environment(hub, tmp_path):
    """Of a process that knows only this Hub."""
    changes = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return {**kept, **changes, "HF_TOKEN": "hf_writer"}


@pytest.fixture
def small(tmp_path):
    model = tiny_model("bert")
    config = PruningConfig(keep=0.6, shapes="per_layer", align=4, calibration_samples=64, sequence_length=12)
    prune(model, [tiny_batch(model, 64)], config)
    save_pretrained(model, tmp_path / "small")
    return tmp_path / "small"


def python(environment, code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def pushed(environment, *arguments):
    return python(environment, "import sys; from hf_prune.cli import main; sys.exit(main())", "push", *arguments)


def contents(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def opened(environment, repo, revision="main"):
    done = python(environment, OPEN, repo, revision)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_what_was_pushed_opens_elsewhere(hub, environment, small):
    done = pushed(environment, small, "me/small", "--private")
    assert done.returncode == 0, done.stderr[-2000:]
    assert hub.endpoint in done.stdout
    there = {path: content for path, content in hub.repos["me/small"]["main"].items() if path != ".gitattributes"}
    assert there == contents(small)
    assert b'from_pretrained("me/small")' in there["README.md"]
    assert (small / "model.safetensors").read_bytes() in hub.objects.values()  # went through LFS
    assert hub.private == {"me/small"}
    assert opened(environment, "me/small") == opened(environment, small)


def test_an_existing_repository_gets_a_commit(hub, environment, small):
    for revision in ((), ("--revision", "v2")):
        done = pushed(environment, small, "me/small", *revision)
        assert done.returncode == 0, done.stderr[-2000:]
    assert set(hub.repos["me/small"]) == {"main", "v2"}
    assert opened(environment, "me/small", "v2") == opened(environment, small)


@pytest.mark.parametrize(("token", "status"), [("hf_nobody", 401), ("hf_stranger", 403)])
def test_who_may_not_write_is_told(hub, environment, small, token, status):
    done = pushed({**environment, "HF_TOKEN": token}, small, "me/small")
    assert done.returncode == 2
    assert f"error: The Hub refused me/small ({status})" in done.stderr
    assert "No file was uploaded" in done.stderr
    assert hub.repos == {}


def test_no_token(hub, environment, small):
    done = pushed({k: v for k, v in environment.items() if k != "HF_TOKEN"}, small, "me/small")
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert hub.repos == {}


def test_what_a_trainer_left_beside_it_stays(hub, environment, small):
    for name in ("checkpoint-4/optimizer.pt", "runs/events", ".small.tmp"):
        (small / name).parent.mkdir(exist_ok=True)
        (small / name).write_text("not proven")
    (small / "README.md").write_text("mine")
    assert pushed(environment, small, "me/small").returncode == 0
    there = hub.repos["me/small"]["main"]
    assert {path.split("/")[0] for path in there} <= {path.name for path in small.iterdir()} | {".gitattributes"}
    assert not [path for path in there if path.startswith(("checkpoint", "runs", ".small"))]
    assert there["README.md"] == b"mine"


def test_a_busy_hub_is_asked_again(hub, environment, small):
    hub.faults["commit"] = 1
    done = pushed(environment, small, "me/small")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.safetensors" in hub.repos["me/small"]["main"]


def test_a_cut_line_is_tried_again(hub, environment, small):
    hub.faults["PUT"] = 2
    done = pushed(environment, small, "me/small")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.safetensors" in hub.repos["me/small"]["main"]


def test_a_line_that_stays_cut_loses_nothing(hub, environment, small):
    (small / "README.md").write_text("mine")
    before = contents(small)
    hub.faults["PUT"] = 10**6
    done = pushed(environment, small, "me/small")
    assert done.returncode == 2
    assert "No commit was made" in done.stderr
    assert hub.repos["me/small"]["main"] == {}
    assert contents(small) == before
    hub.faults.clear()
    assert pushed(environment, small, "me/small").returncode == 0


def test_only_what_was_proven_is_pushed(hub, environment, small):
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    done = pushed(environment, small, "me/small")
    assert done.returncode == 2
    assert "is not what was proven to reload: config.json changed since" in done.stderr
    assert hub.repos == {}


def test_without_a_network(environment, small):
    done = pushed({**environment, "HF_HUB_OFFLINE": "1"}, small, "me/small")
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr


PUSH_BY_TRAINER = """
import sys
sys.path.insert(0, sys.argv[1])
from training import trainer
run = trainer("small", args={"hub_model_id": "me/small", "push_to_hub": True})
run.train()
run.push_to_hub()
run.model.push_to_hub("me/plain")
print("done")
"""


def test_a_trainer_pushes(hub, environment, tmp_path):
    command = [sys.executable, "-c", PUSH_BY_TRAINER, os.path.dirname(__file__)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"README.md", "pruning_plan.json", "config.json", "model.safetensors"} <= set(hub.repos["me/small"]["main"])
    assert opened(environment, "me/small") == opened(environment, "me/plain")
