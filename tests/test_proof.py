"""What is proven is what is there: every way to damage a checkpoint, at every door that reads one; and bad saves."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import transformers
from corrupted import DAMAGES, OF_CLASS, OF_ENTRY, OF_FILES, OF_SIZES, OTHERS
from huggingface_hub.errors import StrictDataclassError  # transformers' own, of a config value of a wrong type
from test_reload import tiny_tokenizer
from tiny import cut_tiny, distance, outputs, tiny, tiny_batch

from hf_prune import PruningConfig, prune, save_pretrained, verify
from hf_prune.checkpoint.history import PLAN_FILE, history_of
from hf_prune.checkpoint.proof import PROOF_FILE
from hf_prune.cli.main import main
from hf_prune.report import plots
from hf_prune.report.card import write_card
from hf_prune.report.engines import checkpoint_rows

OURS = (ValueError, OSError)
AGAIN = PruningConfig(keep=0.95, shapes="per_layer", repair="none", align=1, criterion="magnitude")
BERT = transformers.BertForSequenceClassification


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = cut_tiny(BERT.__name__, "per_layer")
    home = tmp_path_factory.mktemp("good") / "small"
    save_pretrained(model, home, processing_class=tiny_tokenizer())
    return model, home


@pytest.fixture
def home(good, tmp_path):
    return shutil.copytree(good[1], tmp_path / "small")


@pytest.fixture(autouse=True)
def _without_pictures(monkeypatch):
    monkeypatch.setattr(plots, "can_draw", lambda: False)


def is_plain(error, home):
    """One or two sentences that name what was found, not a bare key or a traceback."""
    text = str(error).replace(str(home), "")
    assert len(text.split()) >= 5, text
    assert "Traceback" not in text
    assert text.count("\n") <= 1
    return True


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_not_what_was_proven(home, name):
    DAMAGES[name](home)
    with pytest.raises(ValueError) as caught:
        verify(home)
    assert is_plain(caught.value, home)


@pytest.mark.parametrize("name", DAMAGES)
def test_the_card_of_a_damaged_checkpoint(home, name):
    """Either it is written, or one of our errors says which file does not hold what it should."""
    DAMAGES[name](home)
    try:
        text = write_card(home).read_text()
    except OURS as error:
        said = str(error)
        assert is_plain(said, home)
        assert ".json" in said
        assert not (home / "README.md").exists()
    else:
        assert "% of its multiply-adds" in text
    if name in OF_CLASS or (name in OF_ENTRY and name.split()[0] in ("entry", "format", "shapes", "unknown")):
        assert not (home / "README.md").exists()


@pytest.mark.filterwarnings("default")  # the command line shows them
@pytest.mark.parametrize("name", DAMAGES)
def test_inspect_says_that_a_checkpoint_is_damaged(home, name, capsys):
    DAMAGES[name](home)
    code = main(["inspect", str(home)])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if code:
        assert is_plain(said.splitlines()[-1], home)
    else:
        assert "warning: " in said
        assert PROOF_FILE in said or "not what was proven" in said or "never proven" in said


THEIRS = {  # what transformers itself reads, and raises of, before anything of ours is asked
    *(name for name in OF_FILES if name.startswith(("model.safetensors", "config.json"))),
    *(name for name in OF_SIZES if name not in ("a layer's width is 49",)),
    "an adapter beside it",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_opens_right_or_not_at_all(good, home, name):
    model, _ = good
    DAMAGES[name](home)
    batch = tiny_batch(model)
    try:
        opened = BERT.from_pretrained(home).eval()
    except Exception as error:
        kind = type(error)
        assert issubclass(kind, (*OURS, StrictDataclassError)) or (name in THEIRS and kind is not MemoryError)
    else:
        right = distance(outputs(opened, batch), outputs(model, batch)) <= 1e-5
        assert right or name == "a flipped bit"  # which verify() tells


@pytest.mark.parametrize("value", [10**9, -1, 0, 49], ids=["a billion", "negative", "zero", "one more than dense"])
@pytest.mark.parametrize("key", ["num_attention_heads", "intermediate_size"])
def test_sizes_beyond_dense_are_refused_before_anything_is_built(home, key, value, monkeypatch):
    config = json.loads((home / "config.json").read_text())
    (home / "config.json").write_text(json.dumps({**config, key: value}))
    monkeypatch.setattr(transformers.BertModel, "__init__", lambda *_: pytest.fail("built"))
    with pytest.raises(ValueError, match=rf"{key}={value}, of \d+ when dense"):
        BERT.from_pretrained(home)
    with pytest.raises(ValueError, match=rf"{key}={value}, of \d+ when dense"):
        transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.from_pretrained(home))


PLANS = [name for name in DAMAGES if name.startswith(("pruning_", "verified", "plan", "kept", "report", "proof"))]


@pytest.mark.parametrize("name", PLANS)
def test_pruning_a_damaged_checkpoint_again_composes_rightly_or_is_refused(good, home, name):
    model, _ = good
    DAMAGES[name](home)
    opened = BERT.from_pretrained(home).eval()
    before = model._hf_prune.plan
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = prune(opened, [tiny_batch(model)], AGAIN)
        except ValueError as error:
            assert "hf_prune.plan says" in str(error)  # noqa: PT017  of the two ends the other is checked below
            assert name.startswith("plan ")
            assert not hasattr(opened, "_hf_prune")
            return
    assert history_of(opened).plan.hash == before.compose(result.plan).hash
    if name.startswith(("pruning_", "plan ", "report")) and not name.endswith(("missing", "empty cuts")):
        assert [str(w.message) for w in said if "pruning_" in str(w.message)]


def test_damages_are_many():
    assert len(DAMAGES) == len(OF_FILES) + len(OF_ENTRY) + len(OF_SIZES) + len(OF_CLASS) + len(OTHERS) >= 110


@pytest.mark.parametrize("door", [verify, write_card, checkpoint_rows])
@pytest.mark.parametrize(
    ("path", "error"),
    [(None, TypeError), (3, TypeError), (b"small", TypeError), ("", ValueError), ("a\0b", ValueError),
     ("x" * 300, ValueError), ("nowhere", FileNotFoundError), ("file", OSError), ("file/below", OSError)],
)  # fmt: skip
def test_what_is_no_checkpoint(tmp_path, monkeypatch, door, path, error):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises((error, FileNotFoundError) if path == "" else error) as caught:
        door(path)
    assert is_plain(caught.value, tmp_path)


def test_a_home_directory_is_found(good, tmp_path, monkeypatch):
    shutil.copytree(good[1], tmp_path / "small")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert verify("~/small") <= 1e-5


# --- saves that cannot be proven -------------------------------------------------------------------------------------


class Own(BERT):
    """A user's subclass."""


@pytest.fixture(scope="module")
def model():
    return cut_tiny(BERT.__name__, "per_layer")


BAD_BATCHES = [
    3, [], {}, "text", [1], [{}], [{"input_ids": [1, 2]}], [{"input_ids": torch.tensor(3)}],
    {"input_ids": torch.ones(2, 4, dtype=torch.long)}, [{"input_ids": torch.full((2, 4), 99)}],
    [{"input_ids": torch.rand(2, 4)}], [{"words": torch.ones(2, 4)}], [{"input_ids": torch.ones(0, 4).long()}],
]  # fmt: skip


@pytest.mark.parametrize("batches", BAD_BATCHES, ids=range(len(BAD_BATCHES)))
def test_batches_of_another_form(model, tmp_path, batches):
    with pytest.raises(ValueError, match="batches") as caught:
        save_pretrained(model, tmp_path / "out", batches)
    assert is_plain(caught.value, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", [iter, tuple], ids=["an iterator", "a tuple"])
def test_batches_in_any_sequence(model, tmp_path, batches):
    assert save_pretrained(model, tmp_path / "out", batches([tiny_batch(model)])) <= 1e-5


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"processing_class": "bert-base-uncased"}, TypeError, "processing_class is a tokenizer"),
        ({"processing_class": object()}, TypeError, "has no save_pretrained"),
        ({"model_type": "foo"}, ValueError, "cannot be saved as 'foo'"),
        ({"model_type": 3}, ValueError, "cannot be saved as 3"),
        ({"push_to_hub": True}, ValueError, "does not take push_to_hub"),
        ({"variant": "fp16"}, ValueError, "does not take variant"),
        ({"safe_serialization": False}, ValueError, "safetensors"),
        ({"is_main_process": False}, ValueError, "is_main_process"),
        ({"max_shards": 3}, ValueError, "does not take max_shards"),
        ({"max_shard_size": "big"}, ValueError, "big"),
        ({"state_dict": 3}, TypeError, "mapping of tensors, got int"),
    ],
)
def test_arguments_that_would_save_something_else(model, tmp_path, given, error, match):
    with pytest.raises(error, match=match):
        save_pretrained(model, tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_a_state_dict_of_another_model_is_not_proven(model, tmp_path):
    weights = {name: value * 2 for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="does not reproduce"):
        save_pretrained(model, tmp_path / "out", state_dict=weights)
    assert list(tmp_path.iterdir()) == []


def test_weights_in_several_files_are_proven(model, tmp_path):
    save_pretrained(model, tmp_path / "out", max_shard_size="20KB")
    shards = [path.name for path in (tmp_path / "out").glob("model-*.safetensors")]
    proof = json.loads((tmp_path / "out" / PROOF_FILE).read_text())
    assert len(shards) > 1
    assert {*shards, "model.safetensors.index.json"} <= set(proof["files"])
    assert verify(tmp_path / "out") <= 1e-5
    (tmp_path / "out" / shards[0]).unlink()
    with pytest.raises(ValueError, match=shards[0]):
        verify(tmp_path / "out")


def wrapped(model, kind):
    import peft

    if kind == "compiled":
        return torch.compile(model)
    if kind == "peft":
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2))
    return {"module": torch.nn.Linear(2, 2), "parallel": torch.nn.DataParallel(model), "none": None, "word": "small"}[
        kind
    ]


@pytest.mark.filterwarnings("ignore")  # torch's and peft's own, of each other
@pytest.mark.parametrize("kind", ["compiled", "peft", "module", "parallel", "none", "word"])
def test_what_is_no_transformers_model(tmp_path, kind):
    given = wrapped(tiny(BERT.__name__), kind)
    with pytest.raises(TypeError, match=r"PreTrainedModel|is a wrapper") as caught:
        save_pretrained(given, tmp_path / "out")
    assert is_plain(caught.value, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_inside_a_model_are_not_saved_alone(tmp_path):
    model = tiny(BERT.__name__)
    model._hf_peft_config_loaded = True  # what model.add_adapter() sets
    with pytest.raises(ValueError, match="has adapters"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_output_that_is_not_a_number_is_not_proven(tmp_path):
    """The largest of [0, NaN] must not be 0."""
    model = cut_tiny("BertForQuestionAnswering", "per_layer")
    with torch.no_grad():
        model.qa_outputs.bias[1] = float("nan")
    with pytest.raises(RuntimeError, match="does not reproduce"):
        save_pretrained(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- remote code of other classes ------------------------------------------------------------------------------------


def test_remote_code_of_a_users_subclass_is_refused(model, tmp_path):
    own = Own(tiny(BERT.__name__).config)
    with pytest.raises(ValueError, match=r"remote_code=True.*test_proof\.Own is none"):
        save_pretrained(own, tmp_path / "out", remote_code=True)
    assert list(tmp_path.iterdir()) == []


def test_a_users_subclass_saves_and_opens_as_itself(good, tmp_path):
    own = Own.from_pretrained(good[1]).eval()
    save_pretrained(own, tmp_path / "out")
    again = Own.from_pretrained(tmp_path / "out").eval()
    assert distance(outputs(again, tiny_batch(own)), outputs(own, tiny_batch(own))) <= 1e-5
    with pytest.raises(ValueError, match="names the class"):
        write_card(tmp_path / "out")


@pytest.mark.parametrize("remote_code", [False, True])
def test_a_model_opened_by_remote_code_is_saved_again(model, tmp_path, monkeypatch, remote_code):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    save_pretrained(model, tmp_path / "once", remote_code=True)
    auto = transformers.AutoModelForSequenceClassification
    opened = auto.from_pretrained(tmp_path / "once", trust_remote_code=True).eval()
    assert type(opened).__name__ == f"Pruned{BERT.__name__}"
    save_pretrained(opened, tmp_path / "twice", remote_code=remote_code)
    again = auto.from_pretrained(tmp_path / "twice", trust_remote_code=True).eval()
    assert distance(outputs(again, tiny_batch(model)), outputs(model, tiny_batch(model))) <= 1e-5
    assert history_of(again).plan.hash == model._hf_prune.plan.hash
    assert (tmp_path / "twice" / PLAN_FILE).is_file()
    assert write_card(tmp_path / "twice")
