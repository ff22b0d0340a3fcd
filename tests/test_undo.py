"""A cut that is stopped anywhere, by an error or by Ctrl-C, leaves the model bit for bit as it was."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from tiny import CLASSES, changed, cut_everywhere, distance, outputs, snapshot, tiny, tiny_batch
from torch import nn

from hf_prune import PruningConfig, describe, execute, oneshot, prune
from hf_prune.checkpoint import layout
from hf_prune.model import cut as cutting
from hf_prune.model import undo
from hf_prune.model.undo import undone_on_error
from hf_prune.repair import walk

MODELS = [CLASSES[family][0] for family in ("bert", "gpt2", "llama", "t5", "phi3", "bart")]
STAGES = {  # what a cut is made of: module, name
    "a new weight": (cutting, "put_"),
    "a refitted weight": (walk, "set_matrix_"),
    "the units of a site, in the repair": (walk, "cut_"),
    "the units of a site": (execute, "cut_"),
    "the config": (oneshot, "write_"),
    "one of its sizes": (layout, "holders"),
    "its form": (layout, "_form"),
}

ROADS = [
    *(("least_squares", stage) for stage in STAGES if stage != "the units of a site"),
    ("none", "the units of a site"), ("none", "the config"),
]  # fmt: skip


class Stop(Exception):
    pass


class Stage:
    """A function that raises behind its n-th call; 0: never, it counts."""

    def __init__(self, real, error=Stop, at=0):
        self.real, self.error, self.at, self.calls = real, error, at, 0

    def __call__(self, *args, **kwargs):
        result = self.real(*args, **kwargs)
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return result


def attributes(model):
    """What modules hold beside weights: counts, widths, flags, and which objects they share."""
    plain = (int, float, str, bool, type(None), tuple)
    return [
        {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        | {"config": id(vars(module).get("config")), "names": sorted(vars(module)), "weights": list(module._parameters)}
        for module in model.modules()
    ]


def state(model):
    pointers = {name: (id(p), p.data_ptr(), p._version) for name, p in model.named_parameters()}
    return copy.deepcopy(attributes(model)), pointers, dict(model.config.__dict__)


def cut(model, repair):
    plan = cut_everywhere(describe(model))
    return prune(model, [tiny_batch(model)], PruningConfig(repair=repair), plan=plan)


def stopped(model, repair, monkeypatch, stage, error, at):
    """Run a cut that is stopped, and compare."""
    module, name = STAGES[stage]
    batch = tiny_batch(model)
    given = outputs(model, batch)  # first: what transformers reads off the labels, it writes into the config
    before, told = snapshot(model), state(model)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Stage(getattr(module, name), error, at))
        with pytest.raises(error):
            cut(model, repair)
    assert list(changed(before, model)) == []
    assert state(model) == told
    assert not hasattr(model, "_hf_prune")
    assert "hf_prune" not in model.config.to_dict()
    assert distance(outputs(model, batch), given) == 0


@functools.cache
def counted(class_name, repair, stage):
    """How often a stage is reached in a whole cut."""
    with pytest.MonkeyPatch.context() as patch:
        module, name = STAGES[stage]
        spy = Stage(getattr(module, name))
        patch.setattr(module, name, spy)
        cut(tiny(class_name), repair)
    return spy.calls


@pytest.mark.filterwarnings("ignore:.*calibration tokens to refit")
@pytest.mark.parametrize(("repair", "stage"), ROADS)
@pytest.mark.parametrize("class_name", MODELS)
def test_a_cut_that_is_stopped_changes_nothing(class_name, stage, repair, monkeypatch):
    """At its first, a middle and its last time, the error's and the user's."""
    calls = counted(class_name, repair, stage)
    model = tiny(class_name)
    for at, error in ((1, Stop), ((calls + 1) // 2, KeyboardInterrupt), (calls, Stop)):
        stopped(model, repair, monkeypatch, stage, error, at)
    before = outputs(model, tiny_batch(model))
    cut(model, repair)  # and then it can be cut after all
    assert distance(outputs(model, tiny_batch(model)), before) > 0
    assert model._hf_prune.plan.hash == model.config.hf_prune["plan"]


@pytest.mark.filterwarnings("ignore:.*calibration tokens to refit")
@pytest.mark.parametrize("class_name", MODELS)
def test_a_second_cut_that_is_stopped_leaves_the_first(class_name, monkeypatch):
    model = tiny(class_name)
    cut(model, "none")
    history, before, told = model._hf_prune, snapshot(model), state(model)
    again = PruningConfig(keep=0.9, shapes="per_layer", align=1, criterion="magnitude")
    monkeypatch.setattr(oneshot, "write_", Stage(oneshot.write_, Stop, 1))
    with pytest.raises(Stop):
        prune(model, [tiny_batch(model)], again)
    assert list(changed(before, model)) == []
    assert state(model) == told
    assert model._hf_prune is history


# --- the tool alone --------------------------------------------------------------------------------------------------


def test_flags_gradients_and_hooks_come_back():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    layer.weight.grad, layer.bias.grad = None, torch.ones(3)
    handle = layer.register_forward_hook(lambda *_: None)
    old, gradient = layer.bias, layer.bias.grad

    def change():
        with undone_on_error([layer], []):
            layer.weight = nn.Parameter(torch.zeros(2, 3))
            layer.bias = None
            layer.out_features = 2
            layer.extra = "new"
            raise Stop

    with pytest.raises(Stop):
        change()
    assert layer.weight.shape == (3, 3)
    assert not layer.weight.requires_grad
    assert layer.bias is old
    assert layer.bias.grad is gradient
    assert layer.out_features == 3
    assert not hasattr(layer, "extra")
    assert len(layer._forward_hooks) == 1
    handle.remove()
    assert len(layer._forward_hooks) == 0


def test_what_is_finished_stays():
    layer = nn.Linear(3, 3)
    with undone_on_error([layer], []):
        layer.weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.weight.shape == (2, 3)


def test_a_tie_between_layers_comes_back():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight

    def change():
        with undone_on_error([first, second], []):
            first.weight = nn.Parameter(torch.zeros(2, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change()
    assert second.weight is first.weight


def test_old_weights_in_a_file_come_back(monkeypatch):
    """Bit by bit, tied ones as one, and those that nobody replaced are still the same objects."""
    monkeypatch.setattr(undo, "ROOM", 0)
    model = tiny("LlamaForCausalLM", tie_word_embeddings=True)
    model.tie_weights()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    before, untouched = snapshot(model), model.model.norm.weight
    put_back = undo.remembered(list(model.modules()), [model.config])
    for module in (model.model.embed_tokens, model.model.layers[0].mlp.down_proj):
        module.weight = nn.Parameter(module.weight[:3].detach().clone())
    assert [*changed(before, model)]
    put_back()
    assert [*changed(before, model)] == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.norm.weight is untouched
