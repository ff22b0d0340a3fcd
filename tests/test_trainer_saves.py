"""PruningTrainer.save_model: all of a save or nothing, and what is proven is what is there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import outputs, tiny, tiny_batch
from training import trainer
from transformers import AutoModelForSequenceClassification, GenerationConfig

import hf_prune

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tokens to refit"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft
]
NAME = "BertForSequenceClassification"
LORA = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "init_lora_weights": False}


def adapter(home):
    get_peft_model(tiny(NAME), LoraConfig(**LORA)).save_pretrained(home)


def shards(home):
    tiny(NAME, seed=3).save_pretrained(home, max_shard_size="20KB")
    assert (home / "model.safetensors.index.json").is_file()


STALE = {  # what an earlier save may have left -> the name of one of its files
    "an adapter": (adapter, "adapter_model.safetensors"),
    "shards": (shards, "model.safetensors.index.json"),
    "torch weights": (lambda home: torch.save({}, home / "pytorch_model.bin"), "pytorch_model.bin"),
    "how to generate": (lambda home: GenerationConfig(max_length=3).save_pretrained(home), "generation_config.json"),
    "adapters' base": (lambda home: tiny(NAME).save_pretrained(home / "base_model"), "base_model"),
    "code": (lambda home: (home / "modeling_hf_prune.py").write_text("raise SystemExit"), "modeling_hf_prune.py"),
    "a proof": (lambda home: (home / "verified.json").write_text('{"files": {}}'), ""),
    "half a card": (lambda home: (home / ".README.md.12.tmp").write_text("# "), ".README.md.12.tmp"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = trainer(tmp_path_factory.mktemp("run"), args={"max_steps": 2})
    run.train()
    return run


@pytest.fixture
def quick(run, monkeypatch):
    """Without the card, whose pictures take their time."""
    monkeypatch.setattr(run._saver.card, "write", lambda *_: None)
    return run


def kept(home):
    """Files that are not the model's."""
    for name in (
        "notes.txt",
        "runs/events",
        "checkpoint-3/model.safetensors",
        "checkpoint-3/adapter_model.safetensors",
    ):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
        yield name


@pytest.mark.parametrize("what", STALE)
def test_nothing_of_an_earlier_save_is_loaded(quick, tmp_path, what):
    leave, name = STALE[what]
    names = list(kept(tmp_path / "small"))
    leave(tmp_path / "small")
    quick.save_model(str(tmp_path / "small"))
    assert not name or not (tmp_path / "small" / name).exists()
    assert hf_prune.verify(tmp_path / "small") < 1e-6
    assert all((tmp_path / "small" / name).read_text() == name for name in names)
    batch = tiny_batch(quick.model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(outputs(quick.model.eval(), batch)[0], outputs(again, batch)[0])


def test_links_and_open_logs_stay_what_they_are(quick, tmp_path):
    home = tmp_path / "small"
    (home / "runs").mkdir(parents=True)
    (home / "latest").symlink_to("runs")
    with (home / "runs" / "events").open("a") as log:
        quick.save_model(str(home))
        log.write("after")
    assert (home / "runs" / "events").read_text() == "after"
    assert os.readlink(home / "latest") == "runs"


def test_a_save_through_a_link_is_where_the_link_leads(quick, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    quick.save_model(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert hf_prune.verify(tmp_path / "real") < 1e-6


def test_a_save_that_fails_leaves_the_earlier_one(quick, tmp_path, monkeypatch):
    home = tmp_path / "small"
    quick.save_model(str(home))
    before = {path.name: path.read_bytes() for path in home.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("hf_prune.train.saver.prove", "hf_prune.train.saver.carry", "hf_prune.checkpoint.directory._put"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(OSError, match="No space left"):
                quick.save_model(str(home))
        assert {path.name: path.read_bytes() for path in home.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_card_that_cannot_be_written_loses_no_weights(run, tmp_path, monkeypatch):
    """Not even where the modules that write it are not there."""
    monkeypatch.setitem(sys.modules, "hf_prune.report.card", None)
    with pytest.warns(UserWarning, match=r"small is saved, but not its card .*see `hf-prune card`"):
        run.save_model(str(tmp_path / "small"))
    assert hf_prune.verify(tmp_path / "small") < 1e-6


def test_a_name_that_begins_like_a_checkpoint_s_is_proven_too(quick, tmp_path):
    quick.save_model(str(tmp_path / "checkpoint-final"))
    assert hf_prune.verify(tmp_path / "checkpoint-final") < 1e-6


def test_adapters_are_proven_with_their_base(tmp_path):
    given = {"peft_config": LoraConfig(**LORA), "merge_adapters": False}
    run = trainer(tmp_path / "run", args={"max_steps": 2}, **given)
    run.train()
    home = tmp_path / "small"
    home.mkdir()
    shards(home)  # an earlier model, dense, whose weights must not be found beside the adapters
    run.save_model(str(home))
    assert hf_prune.verify(home) < 1e-5
    assert not list(home.glob("model*"))
    base = AutoModelForSequenceClassification.from_pretrained(home / "base_model")
    again = PeftModel.from_pretrained(base, str(home))
    batch = tiny_batch(run.model)
    assert torch.allclose(outputs(run.model.eval(), batch)[0], outputs(again.eval(), batch)[0], atol=1e-6)
    (home / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"adapter_config\.json changed since"):
        hf_prune.verify(home)


def test_adapters_that_do_not_reload_are_not_left(tmp_path, monkeypatch):
    given = {"peft_config": LoraConfig(**LORA), "merge_adapters": False}
    run = trainer(tmp_path / "run", args={"max_steps": 2}, **given)
    run.train()
    save = PeftModel.save_pretrained

    def changed(self, directory, **kwargs):
        """Other adapters than those in memory."""
        before = {n: p.detach().clone() for n, p in self.named_parameters() if "lora_A" in n}
        for name, p in self.named_parameters():
            p.data += 1.0 * (name in before)
        save(self, directory, **kwargs)
        for name, p in self.named_parameters():
            p.data = before.get(name, p.data)

    monkeypatch.setattr(PeftModel, "save_pretrained", changed)
    with pytest.raises(RuntimeError, match="with adapters does not reproduce the model in memory"):
        run.save_model(str(tmp_path / "small"))
    assert not (tmp_path / "small").exists()


# --- where a save cannot be all or nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("directory", "error", "message"),
    [
        (".", ValueError, "output_dir, .*'.' is the current directory or holds it"),
        ("..", ValueError, "output_dir, .*holds it, and cannot be replaced as a whole"),
        ("/", ValueError, "cannot be replaced as a whole"),
        ("/proc", ValueError, "is a mount point"),
        ("notes.txt", FileExistsError, "output_dir, .*notes.txt is a file"),
        ("notes.txt/run", FileExistsError, "output_dir, .*notes.txt is a file"),
    ],
)
def test_an_output_directory_that_cannot_be_replaced_is_refused_before_the_training(
    tmp_path, monkeypatch, directory, error, message
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("notes.txt").write_text("mine")
    with pytest.raises(error, match=message):
        trainer(directory)


def test_without_pruning_it_may_be_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(".", pruning=None)
    run.save_model()
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("given", [".", "..", "/"])
def test_nor_does_a_save_replace_it(quick, tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="cannot be replaced as a whole"):
        quick.save_model(given)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
