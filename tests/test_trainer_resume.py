"""PruningTrainer resumed: on other data, and from checkpoints that are damaged in every way."""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny import tiny, tiny_batch
from training import rows, trainer

from hf_prune.train.resume import apart, complete_checkpoints, damage, known_by

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens to refit")
NAME = "BertForSequenceClassification"
RUN = {"args": {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}, "pruning": {"rounds": 2}}


def write(name, text):
    return lambda home: (home / name).write_text(text)


def half(name):
    """As a full disk or a broken copy leaves it."""
    return lambda home: (home / name).write_bytes((home / name).read_bytes()[: (home / name).stat().st_size // 2])


def longer(home):
    path = home / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"0" * 9)


def without(name):
    return lambda home: (home / name).unlink()


def edited(name, **changes):
    def do(home):
        (home / name).write_text(json.dumps({**json.loads((home / name).read_text()), **changes}))

    return do


DAMAGES = {  # how -> what the message names
    "weights cut off": (half("model.safetensors"), "model.safetensors is missing or not whole"),
    "weights too long": (longer, "model.safetensors is missing or not whole"),
    "weights empty": (write("model.safetensors", ""), "model.safetensors"),
    "weights are text": (write("model.safetensors", "version https://git-lfs"), "model.safetensors"),
    "no weights": (without("model.safetensors"), "model.safetensors is missing"),
    "a shard missing": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-1.safetensors"}}'), "model-1.safetensors",
    ),
    "an index of nothing": (write("model.safetensors.index.json", '{"weight_map": 3}'), "names no files"),
    "an index cut off": (write("model.safetensors.index.json", '{"weight'), "is no JSON"),
    "config cut off": (half("config.json"), "config.json is no JSON"),
    "no config": (without("config.json"), "config.json is missing"),
    "plan cut off": (half("pruning_plan.json"), "pruning_plan.json is no JSON"),
    "no plan": (without("pruning_plan.json"), "pruning_plan.json is missing"),
    "run's state cut off": (half("pruning_state.json"), "pruning_state.json is no JSON"),
    "run's state is a list": (write("pruning_state.json", "[1]"), "holds a JSON list"),
    "run's state is empty": (write("pruning_state.json", "{}"), "has format None"),
    "run's state of the future": (edited("pruning_state.json", format=9), "has format 9; this hf_prune knows 1"),
    "run's state without rounds": (edited("pruning_state.json", cuts=None), "pruning_state.json is damaged"),
    "run's state, another type": (edited("pruning_state.json", config=5), "pruning_state.json is damaged"),
    "run's state, a plan of words": (edited("pruning_state.json", plan="all"), "pruning_state.json is damaged"),
    "run's state, costs of words": (edited("pruning_state.json", dense_cost={"a": "b"}), "json is damaged"),
    "no run's state": (without("pruning_state.json"), "pruning_state.json is missing"),
    "trainer's state cut off": (half("trainer_state.json"), "trainer_state.json is no JSON"),
    "trainer's state, no step": (edited("trainer_state.json", global_step="2"), "trainer_state.json names no step"),
    "trainer's state, unknown": (edited("trainer_state.json", moon=1), "trainer_state.json is damaged"),
    "no trainer's state": (without("trainer_state.json"), "trainer_state.json is missing"),
    "optimizer cut off": (half("optimizer.pt"), "optimizer.pt is missing or not whole"),
    "no optimizer": (without("optimizer.pt"), "optimizer.pt is missing"),
    "no scheduler": (without("scheduler.pt"), "scheduler.pt is missing"),
    "random states cut off": (half("rng_state.pth"), "rng_state.pth is missing or not whole"),
    "a file": (lambda home: (shutil.rmtree(home), home.write_text("")), "missing|Not a directory"),
    "nothing": (lambda home: shutil.rmtree(home), "pruning_state.json is missing"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    home = tmp_path_factory.mktemp("finished")
    run = trainer(home, **RUN)
    run.train()
    return home, run.model.state_dict()


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_named(copied, how):
    do, message = DAMAGES[how]
    latest = copied / "checkpoint-4"
    assert damage(latest) == ""
    do(latest)
    assert [path.name for path in complete_checkpoints(copied)] == ["checkpoint-0", "checkpoint-2"]
    run = trainer(copied, **RUN)
    with pytest.raises(ValueError, match=f"checkpoint-4 is no complete checkpoint of a run with pruning.*({message})"):
        run.train(resume_from_checkpoint=str(latest))
    assert run.results == []


@pytest.mark.parametrize("how", ["weights cut off", "optimizer cut off", "run's state cut off"])
def test_an_older_checkpoint_is_taken_for_a_damaged_one(finished, copied, how):
    do, message = DAMAGES[how]
    do(copied / "checkpoint-4")
    run = trainer(copied, **RUN)
    with pytest.warns(UserWarning, match=rf"passed over: checkpoint-4 \(.*{message}.*\)"):
        assert run.train(resume_from_checkpoint=True).global_step == 4
    weights = run.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in finished[1].items())


def test_lost_random_states_are_said(copied):
    (copied / "checkpoint-2" / "rng_state.pth").unlink()
    run = trainer(copied, **RUN)
    with pytest.warns(UserWarning, match=r"checkpoint-2 has no rng_state.*not end as it would have"):
        run.train(resume_from_checkpoint=copied / "checkpoint-2")


@pytest.mark.parametrize("given", [3, 2.5, ["checkpoint-2"], {"checkpoint": 2}], ids=str)
def test_what_is_no_checkpoint(finished, given):
    with pytest.raises(TypeError, match="resume_from_checkpoint takes a directory or True, got"):
        trainer(finished[0], **RUN).train(resume_from_checkpoint=given)


def test_a_checkpoint_that_another_save_is_half_over_is_not_complete(copied, monkeypatch):
    """An earlier run left a checkpoint of the same step: its state must not complete the weights of this one."""

    def killed(*_):
        raise KeyboardInterrupt

    run = trainer(copied, **RUN)
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", killed)
    assert damage(copied / "checkpoint-2") == ""
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert damage(copied / "checkpoint-2") == "trainer_state.json is missing"


def test_a_damaged_best_model_is_no_reason_to_lose_the_run(tmp_path):
    args = {**RUN["args"], "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, args=args, eval_dataset=rows(tiny(NAME)))
    finalize = run._finalize_training

    def damaged(*given):
        half("model.safetensors")(tmp_path / f"checkpoint-{run.state.best_global_step}")
        return finalize(*given)

    run._finalize_training = damaged
    with pytest.warns(UserWarning, match="best model is not loaded, the latest one stays: The checkpoint .* not open"):
        assert run.train().global_step == 4


# --- data ------------------------------------------------------------------------------------------------------------


def others():
    return rows(tiny(NAME)).map(lambda row: {"labels": 1 - row["labels"]})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: rows(tiny(NAME), 31), "another train_dataset: 32 rows there, 31 here"),
        (lambda: rows(tiny(NAME), 64), "another train_dataset: 32 rows there, 64 here"),
        (others, "another train_dataset: other rows"),
        (lambda: list(others()), "another train_dataset: other rows"),
        (lambda: rows(tiny(NAME)).shuffle(seed=1), "another train_dataset: other rows"),
    ],
    ids=["fewer", "more", "other labels", "a list", "another order"],
)
def test_other_data_are_refused(copied, data, message):
    run = trainer(copied, **RUN, train_dataset=data())
    with pytest.raises(ValueError, match=message):
        run.train(resume_from_checkpoint=True)
    assert run.results == []


def test_other_calibration_data_are_refused(tmp_path):
    trainer(tmp_path, **RUN, calibration_dataset=rows(tiny(NAME))).train()
    run = trainer(tmp_path, **RUN, calibration_dataset=others())
    with pytest.raises(ValueError, match="another calibration_dataset: other rows"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("form", [lambda d: d, list, lambda d: d.with_format("torch")], ids=["same", "list", "tensors"])
def test_the_same_data_in_another_form_are_the_same(copied, form):
    assert trainer(copied, **RUN, train_dataset=form(rows(tiny(NAME)))).train(resume_from_checkpoint=True)


class Torch(torch.utils.data.Dataset):
    def __init__(self, noise=False):
        self.noise = noise
        self.batch = tiny_batch(tiny(NAME), 16)

    def __len__(self):
        return 16

    def __getitem__(self, i):
        row = {key: value[i] for key, value in self.batch.items()}
        return {**row, "noise": torch.rand(1)} if self.noise else row


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return (Torch()[i] for i in range(16))


def streamed():
    return IterableDataset.from_generator(lambda: iter(rows(tiny(NAME))))


FORMS = {
    "a Dataset": lambda: rows(tiny(NAME)), "a list": lambda: list(rows(tiny(NAME))), "torch's": Torch,
    "torch's stream": Stream, "a streamed Dataset": streamed, "texts": lambda: [{"text": "a" * i} for i in range(9)],
    "a transform": lambda: rows(tiny(NAME)).with_transform(lambda rows: {"x": torch.rand(len(rows["labels"]))}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_data_made_again_are_known(form):  # in another process: see test_kills_training.py
    first, second = known_by(FORMS[form]()), known_by(FORMS[form]())
    assert first["hash"]
    assert first == second
    assert apart(first, second) == ""


def test_rows_that_are_never_the_same_are_known_by_their_number():
    assert known_by(Torch(noise=True)) == {"rows": 16, "hash": None}
    assert apart(known_by(Torch(noise=True)), known_by(Torch())) == ""


def test_what_can_be_read_once_is_not_read():
    data = iter([{"a": i} for i in range(9)])
    assert known_by(data) == {"rows": None, "hash": None}
    assert len(list(itertools.islice(data, 9))) == 9


def test_data_that_cannot_be_read_are_left_to_the_training():
    class Broken(Torch):
        def __getitem__(self, i):
            raise KeyError("gone")

    assert known_by(Broken()) == {"rows": 16, "hash": None}
    assert known_by(None) is None
    assert known_by(Dataset.from_dict({"a": []})) == known_by(Dataset.from_dict({"a": []}))
