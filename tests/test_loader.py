"""Pruned configs are built to the sizes that they mean: in threads, beside other patches, by subclasses."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch
import transformers
from tiny import CLASSES, cut_tiny, distance, outputs, tiny_batch
from transformers import AutoConfig, PreTrainedModel

from hf_prune import save_pretrained
from hf_prune.checkpoint import loader
from hf_prune.checkpoint.layout import checked
from hf_prune.checkpoint.loader import install_loader

NAME = "BertForSequenceClassification"
CLASS = getattr(transformers, NAME)
THREADS = 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """shapes -> (model, where it was saved)."""
    home = tmp_path_factory.mktemp("saved")
    models = {shapes: cut_tiny(NAME, shapes) for shapes in ("stock", "uniform", "per_layer")}
    for shapes, model in models.items():
        save_pretrained(model, home / shapes)
    return {shapes: (model, home / shapes) for shapes, model in models.items()}


def shapes_of(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


# --- threads ---------------------------------------------------------------------------------------------------------


def by_class(config, home):
    return CLASS(config)


def by_auto_class(config, home):
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.fixture
def unwrapped(monkeypatch):
    """The class as it is before the first pruned config, so that the threads race to wrap it."""
    init = CLASS.__init__
    while hasattr(init, "__wrapped__"):
        init = init.__wrapped__
    monkeypatch.setattr(CLASS, "__init__", init)
    monkeypatch.delattr(CLASS, loader.MARK, raising=False)


@pytest.mark.parametrize("build", [by_class, by_auto_class], ids=["class", "from_config"])
@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
def test_threads_that_share_a_config_all_build_the_pruned_model(saved, unwrapped, shapes, build):
    model, home = saved[shapes]
    config = AutoConfig.from_pretrained(home)
    before, start = config.to_dict(), threading.Barrier(THREADS)
    built: list = [None] * THREADS
    interval = sys.getswitchinterval()

    def run(number):
        start.wait()
        built[number] = build(config, home)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    right = [found is not None and shapes_of(found) == shapes_of(model) for found in built]
    assert sum(right) == THREADS
    after = config.to_dict()
    assert {key: after[key] for key in before if key != "dtype"} == {k: v for k, v in before.items() if k != "dtype"}
    assert {found.config.hf_prune["shapes"] for found in built} == {shapes}


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
def test_threads_that_open_a_checkpoint_all_get_its_weights(saved, unwrapped, shapes):
    model, home = saved[shapes]
    batch, found, errors = tiny_batch(model), [], []
    one_at_a_time = threading.Lock()  # transformers' from_pretrained swaps PreTrainedModel.tie_weights while it loads

    def run():
        try:
            with one_at_a_time:
                opened = CLASS.from_pretrained(home).eval()
            found.append(distance(outputs(opened, batch), outputs(model, batch)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert max(found) <= 1e-5


# --- other patches ---------------------------------------------------------------------------------------------------

PATCHED = """
import sys
from transformers import AutoConfig, BertForSequenceClassification, PreTrainedModel
met = []

def patch(following):
    def __new__(cls, *args, **kwargs):
        met.append(cls.__name__)
        return following(cls) if following is object.__new__ else following(cls, *args, **kwargs)
    PreTrainedModel.__new__ = staticmethod(__new__)

def width():
    config = AutoConfig.from_pretrained(sys.argv[1])
    return BertForSequenceClassification(config).bert.encoder.layer[0].intermediate.dense.out_features

patch(PreTrainedModel.__new__)
import hf_prune
before = width()
patch(PreTrainedModel.__new__)  # another one behind us
after = width()
from hf_prune.checkpoint.loader import install_loader
install_loader()
install_loader()
print(before, after, width(), len(met))
PreTrainedModel.__new__ = staticmethod(lambda cls, *args, **kwargs: object.__new__(cls))  # one that forgets us
try:
    print(width())
except ValueError as error:
    print("told:", error)
"""


def test_other_patches_before_and_behind_the_loader(saved):
    model, home = saved["per_layer"]
    done = subprocess.run([sys.executable, "-c", PATCHED, str(home)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = done.stdout.splitlines()[-2:]
    width = str(model.bert.encoder.layer[0].intermediate.dense.out_features)
    assert first.split()[:3] == [width] * 3
    assert int(first.split()[3]) >= 3
    assert last == width or last.startswith("told:")  # its class was wrapped when it met the first config


def test_installed_twice_it_stands_there_once():
    before = PreTrainedModel.__new__, PreTrainedModel.__init__
    install_loader()
    assert (PreTrainedModel.__new__, PreTrainedModel.__init__) == before


def test_classes_that_meet_no_pruned_config_are_left_alone():
    assert loader.MARK not in transformers.XLNetModel.__dict__
    transformers.XLNetModel(transformers.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8))
    assert loader.MARK not in transformers.XLNetModel.__dict__


# --- subclasses ------------------------------------------------------------------------------------------------------


class Plain(CLASS):
    pass


class More(CLASS):
    def __init__(self, config, extra=3, *, word="x"):
        super().__init__(config)
        self.extra = (extra, word)


class Last(CLASS):
    """Its config is not the first argument."""

    def __init__(self, extra, config):
        super().__init__(config)
        self.extra = extra


class Keyword(CLASS):
    def __init__(self, *, extra, settings):
        super().__init__(settings)
        self.extra = extra


class Creates(CLASS):
    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls, *args, **kwargs)
        made.__dict__["created"] = True
        return made


class Hides(CLASS):
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)


@pytest.mark.parametrize("shapes", ["stock", "uniform", "per_layer"])
@pytest.mark.parametrize(
    "build",
    [
        lambda c: Plain(c), lambda c: Plain(config=c), lambda c: More(c, 4, word="y"),
        lambda c: More(config=c, extra=4),
        lambda c: Last(4, c), lambda c: Last(config=c, extra=4), lambda c: Keyword(extra=4, settings=c),
        lambda c: Creates(c),
    ],
    ids=["plain", "by name", "more", "more by name", "last", "last by name", "keywords", "own __new__"],
)  # fmt: skip
def test_subclasses_of_any_signature_are_built_right(saved, shapes, build):
    model, home = saved[shapes]
    built = build(AutoConfig.from_pretrained(home)).eval()
    assert shapes_of(built) == shapes_of(model)
    built.load_state_dict(model.state_dict())
    assert distance(outputs(built, tiny_batch(model)), outputs(model, tiny_batch(model))) <= 1e-5


@pytest.mark.parametrize("cls", [Plain, More, Creates])
def test_subclasses_open_a_checkpoint(saved, cls):
    model, home = saved["per_layer"]
    opened = cls.from_pretrained(home).eval()
    assert distance(outputs(opened, tiny_batch(model)), outputs(model, tiny_batch(model))) <= 1e-5


def test_a_subclass_that_hides_its_config_is_refused_not_built_dense(saved, unwrapped):
    _, home = saved["per_layer"]
    with pytest.raises(ValueError, match="Hides got the config of a pruned model in a way that hf_prune does not see"):
        Hides(AutoConfig.from_pretrained(home))
    assert shapes_of(Hides(AutoConfig.from_pretrained(saved["stock"][1]))) == shapes_of(saved["stock"][0])


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", [names[0] for names in CLASSES.values()])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_the_model(class_name, again):
    model = cut_tiny(class_name, "per_layer")
    found = again(model)
    assert shapes_of(found) == shapes_of(model)
    assert distance(outputs(found, tiny_batch(model)), outputs(model, tiny_batch(model))) == 0
    assert found._hf_prune.plan == model._hf_prune.plan
    assert found.config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        next(found.parameters()).add_(1)
    assert distance(outputs(found, tiny_batch(model)), outputs(model, tiny_batch(model))) > 0


# --- sizes of encoder-decoders ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5():
    return cut_tiny("T5ForConditionalGeneration", "per_layer")


BAD_LAYERS = [
    3, [1], "all", {"encoder.0.ffn": 3}, {"encoder.0.ffn": {"d_ff": 10**9}}, {"encoder.0.ffn": {"d_ff": 0}},
    {"encoder.0.ffn": {"d_ff": -3}}, {"encoder.0.ffn": {"d_ff": "9"}}, {"encoder.0.ffn": {"d_ff": 2.5}},
    {"encoder.0.ffn": {"d_ff": True}}, {"encoder.0.attention": {"num_heads": 10**9}}, {"encoder.0.ffn": {}},
    {"encoder.0.attention": {}}, {"encoder.0.ffn": {"d_ff": [7]}}, {"encoder.9.ffn": {"d_ff": 10**9}},
]  # fmt: skip


@pytest.mark.parametrize("layers", BAD_LAYERS, ids=[str(row)[:40] for row in BAD_LAYERS])
def test_layers_of_an_encoder_decoder_that_cannot_be_meant(t5, layers):
    config = copy.deepcopy(t5.config)
    held = config.hf_prune["layers"]
    given = {**held, **layers} if isinstance(layers, dict) else layers
    config.hf_prune = {**config.hf_prune, "layers": given}
    with pytest.raises(ValueError, match="The config") as caught:
        type(t5)(config)
    assert "Restore config.json" in str(caught.value)


def test_a_dense_size_of_a_billion_costs_nothing_where_weights_are_loaded(saved, tmp_path):
    """from_pretrained builds on the meta device, so a wrong dense size takes no memory; the model is right."""
    import json
    import shutil

    model, home = saved["per_layer"]
    shutil.copytree(home, tmp_path / "m")
    config = json.loads((home / "config.json").read_text())
    config["hf_prune"]["dense"]["intermediate_size"] = 10**9
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    opened = CLASS.from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(opened, tiny_batch(model)), outputs(model, tiny_batch(model))) <= 1e-5


@pytest.mark.parametrize("entry", [None, {}, [], "", 0, False])
def test_an_empty_entry_says_nothing(entry):
    assert checked(entry) == {}


@pytest.mark.parametrize(
    "entry",
    [3, "pruned", [1], True, {"format": 1}, {"format": 2}, {"format": 3, "shapes": "uniform"},
     {"format": 2, "shapes": "round"}, {"format": None, "shapes": "stock"}, {"shapes": "per_layer"}],
)  # fmt: skip
def test_an_entry_of_another_form_is_refused(entry):
    with pytest.raises(ValueError, match=r"Restore config\.json|restore config\.json"):
        checked(entry)


def test_stock_shapes_of_a_format_to_come_still_open(saved, tmp_path):
    """They are anybody's: no engine needs hf_prune for them."""
    model, home = saved["stock"]
    config = AutoConfig.from_pretrained(home)
    config.hf_prune = {**config.hf_prune, "format": 9}
    assert shapes_of(CLASS(config)) == shapes_of(model)
