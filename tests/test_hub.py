"""Pushing over HTTP with the real client, to a Hub on this machine, and opening what is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings

import pytest
from hub_server import Hub
from test_reload import tiny_tokenizer
from tiny import cut_tiny, tiny_batch, tiny_model

from hf_prune import PruningConfig, prune, save_pretrained
from hf_prune.checkpoint.hub import push
from hf_prune.checkpoint.proof import PROOF_FILE, proven

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own, of httpx
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
    return python(environment, "import sys; from hf_prune.cli.main import main; sys.exit(main())", "push", *arguments)


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


@pytest.mark.slow  # a minute and a half of waiting
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


# --- what stays here -------------------------------------------------------------------------------------------------

SECRET = "hunter2 is secret"
STRAYS = (
    "optimizer.pt", "scheduler.pt", "pytorch_model.bak", "training_args.bin", "secrets.txt", "sub/.env", "sub/id_rsa",
    ".env", ".netrc", "wandb/run-1/files/config.yaml", "runs/events.out", "checkpoint-4/model.safetensors",
    ".git/config", ".cache/huggingface/token", "notes.md", "LICENSE_keys.txt", "pictures/deep/scan.png",
    "pictures/scan.jpg", "sub/README.md", "sub/model.safetensors", "data.csv", "modeling_own.py",
)  # fmt: skip


@pytest.fixture
def here(hub, small, monkeypatch):
    """push() of this process, to this Hub alone."""
    from huggingface_hub import constants

    for name, value in {"ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    (small / "README.md").write_text("mine")
    return lambda directory=small, repo="me/small", **given: push(directory, repo, token="hf_writer", **given)


def received(hub):
    """All that any request brought."""
    files = [content for repo in hub.repos.values() for branch in repo.values() for content in branch.values()]
    return b"\n".join([*files, *hub.objects.values()])


def test_what_no_save_proved_stays_here_and_is_named(hub, here, small):
    for name in STRAYS:
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        (small / name).write_text(SECRET)
    with pytest.warns(UserWarning, match="Not pushed, as no save proved it") as said:
        here()
    (text,) = (str(warning.message) for warning in said if "Not pushed" in str(warning.message))
    tops = sorted({name.split("/")[0] for name in STRAYS if not name.startswith("pictures")} | {"pictures"})
    assert [name for name in tops if name in text] == [*tops[:8]]
    assert f"and {len(tops) - 8} more" in text
    assert set(hub.repos["me/small"]["main"]) - {".gitattributes"} == {*proven(small), PROOF_FILE, "README.md"}
    assert SECRET.encode() not in received(hub)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json",
                                  "model.safetensors.index.json", "model-00002-of-00002.safetensors"])  # fmt: skip
def test_what_would_change_what_is_loaded_is_refused(hub, here, small, name):
    (small / name).write_text(SECRET)
    with pytest.raises(ValueError, match=rf"is not what was proven to reload: {name} changed since"):
        here()
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pruning_plan.json", "pruning_report.json",
                                  "generation_config.json", "tokenizer.json", "tokenizer_config.json"])  # fmt: skip
def test_what_was_edited_is_refused(hub, here, tmp_path, name):
    save_pretrained(cut_tiny("LlamaForCausalLM", "stock"), tmp_path / "m", processing_class=tiny_tokenizer())
    raw = (tmp_path / "m" / name).read_bytes()
    (tmp_path / "m" / name).write_bytes(raw[:-1] + b" " + raw[-1:])
    with pytest.raises(ValueError, match=rf"is not what was proven to reload: {name} changed since"):
        here(tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} changed since"):
        here(tmp_path / "m")
    assert hub.repos == {}


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "evaluation.json", "pictures/kept.png", "model.safetensors"])
def test_a_link_that_leads_out_is_refused(hub, here, small, tmp_path, name):
    path = small / name
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if name.endswith("tensors") else SECRET.encode()
    (tmp_path / "outside").write_bytes(content)
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=rf"{name}: links that lead out of"):
        here()
    assert hub.repos == {}


def test_links_to_directories_outside_are_not_followed(hub, here, small, tmp_path):
    (tmp_path / "home").mkdir()
    for name in ("id_rsa", "kept.png", "README.md"):
        (tmp_path / "home" / name).write_text(SECRET)
    for name in ("sub", "pictures", "wandb"):
        (small / name).symlink_to(tmp_path / "home", target_is_directory=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            here()
    except ValueError as error:
        assert "lead out of" in str(error)  # noqa: PT017  where a glob follows them, they are refused
    assert SECRET.encode() not in received(hub)


def test_a_link_inside_is_what_it_leads_to(hub, here, small):
    (small / "model.safetensors").rename(small / "weights")
    (small / "model.safetensors").symlink_to("weights")
    with pytest.warns(UserWarning, match="Not pushed.*weights"):
        here()
    assert hub.repos["me/small"]["main"]["model.safetensors"] == (small / "weights").read_bytes()


def test_a_checkpoint_in_several_files_is_pushed_whole(hub, here, tmp_path):
    save_pretrained(tiny_model("bert"), tmp_path / "sharded", max_shard_size="20KB")
    here(tmp_path / "sharded")
    there = {name: content for name, content in hub.repos["me/small"]["main"].items() if name != ".gitattributes"}
    assert len(there) > 4
    assert there == contents(tmp_path / "sharded")


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"repo": "small"}, ValueError, "owner/name"), ({"repo": "a/b/c"}, ValueError, "owner/name"),
        ({"repo": ""}, ValueError, "owner/name"), ({"repo": None}, ValueError, "owner/name"),
        ({"repo": 3}, ValueError, "owner/name"), ({"repo": "me/a b"}, ValueError, "owner/name"),
        ({"repo": "me/../x"}, ValueError, "owner/name"), ({"repo": "me/x--y"}, ValueError, "--"),
        ({"repo": "me/" + "x" * 200}, ValueError, "96"), ({"repo": "-me/x."}, ValueError, "."),
        ({"revision": ""}, ValueError, "a branch has a name"), ({"revision": 3}, ValueError, "a branch has a name"),
        ({"directory": None}, TypeError, "A directory is a path"), ({"directory": 3}, TypeError, "is a path"),
        ({"directory": "nowhere"}, FileNotFoundError, "no such directory"), ({"directory": "a\0b"}, ValueError, "path"),
        ({"directory": __file__}, NotADirectoryError, "is a file"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_told_before_anything_is_written(hub, here, small, given, error, match):
    (small / "README.md").unlink()
    with pytest.raises(error, match=match):
        here(**given)
    assert hub.repos == {}
    assert not (small / "README.md").exists()


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
