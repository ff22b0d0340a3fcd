"""Offloaded models: accelerate keeps their weights in memory or on disk, and they are cut where they lie.

The oracle is the same model whole in memory: the same anatomy, plan and weights.
"""

from __future__ import annotations

import copy
import errno
import functools
import gc
import logging
import os
import shutil
from collections import namedtuple

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import OffloadedWeightsLoader, align_module_device, has_offloaded_params
from test_tokens import USED, model_for, qwen
from test_tokens import rows as texts_of
from tiny import distance, outputs, rows, tiny, tiny_batch
from torch.multiprocessing.reductions import StorageWeakRef
from training import arguments

from hf_prune import (
    DistillationConfig,
    PruningCallback,
    PruningConfig,
    PruningTrainer,
    analyze,
    describe,
    measure,
    oneshot,
    prune,
    save_pretrained,
)
from hf_prune.model import cut as cutting
from hf_prune.model import offload
from hf_prune.model.batches import draw
from hf_prune.model.mask import masked
from hf_prune.repair import width
from hf_prune.score import passes
from hf_prune.score.statistics import gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*calibration tokens to refit", "ignore:.*experts in .* layers see", "ignore:.* remains, where keep"
)
TIED = {"tie_word_embeddings": True}
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "tied llama": ("LlamaForCausalLM", TIED),
    "bert": ("BertForSequenceClassification", {}),
    "bert with a tied head": ("BertForMaskedLM", {}),
    "t5": ("T5ForConditionalGeneration", {}),
    "mixtral": ("MixtralForCausalLM", {}),
    "resnet": ("ResNetForImageClassification", {}),
    "bart": ("BartForConditionalGeneration", {}),  # whose root has a hook besides
}
WAYS = ("cpu_offload", "disk_offload", "device_map")
CUT = PruningConfig(keep=0.7, metric="params", shapes="per_layer", align=1)
WIDE = PruningConfig(keep=0.63, metric="params", scope="model", align=1, units=["hidden", "neurons"])
CUTS = {"sites": CUT, "stream": WIDE}
CASES = [
    *((name, way) for name in ("llama", "tied llama", "bert") for way in WAYS),
    ("bert with a tied head", "cpu_offload"),
    ("t5", "disk_offload"),
    ("mixtral", "device_map"),
    ("resnet", "disk_offload"),
    ("bart", "cpu_offload"),
]


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def offloaded(way, home, class_name, **changes):
    """A tiny model with all its weights offloaded."""
    model = tiny(class_name, **changes)
    if way == "cpu_offload":
        return cpu_offload(model, execution_device="cpu")
    if way == "disk_offload":
        return disk_offload(model, home / "folder", execution_device="cpu")
    model.save_pretrained(home / "dense")
    return opened(model, home, {"": "disk"})


def opened(model, home, device_map):
    return type(model).from_pretrained(home / "dense", device_map=device_map, offload_folder=home / "folder").eval()


def weights(model):
    """What accelerate itself loads of every module."""
    found = {}
    for path, module in model.named_modules():
        with align_module_device(module):
            found |= {f"{path}.{name}": p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    return found


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def placed(model):
    """Which weights are in memory, and which modules load theirs."""
    real = [name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta]
    return real, [name for name, module in model.named_modules() if has_offloaded_params(module)]


def ours(home):
    """The files that cuts have written."""
    return sorted(path.name for path in (home / "folder").glob("hf_prune-*"))


def data(model):
    return [tiny_batch(model, batch=16)]


@functools.cache
def pruned_in_memory(name, cut="sites"):
    """Anatomy, plan and weights of the whole model after the same cut, and its outputs."""
    class_name, changes = MODELS[name]
    model = tiny(class_name, **changes)
    anatomy = describe(model)
    plan = prune(model, data(model), CUTS[cut]).plan
    return anatomy, plan, weights(model), outputs(model, tiny_batch(model))


# --- the same as in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "way"), CASES)
def test_the_same_plan_and_weights_as_in_memory(name, way, tmp_path):
    anatomy, plan, wanted, given = pruned_in_memory(name)
    model = offloaded(way, tmp_path, MODELS[name][0], **MODELS[name][1])
    before = placed(model)
    assert describe(model) == anatomy
    found = prune(model, data(model), CUT)
    assert found.plan == plan
    assert same(weights(model), wanted)
    assert placed(model) == before
    assert distance(outputs(model, tiny_batch(model)), given) == 0
    assert describe(model).sizes == describe(model).sizes  # after passes too, which part tied weights
    assert save_pretrained(model, tmp_path / "saved") == 0
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    assert distance(outputs(again, tiny_batch(again)), given) == 0
    assert placed(model) == before


@pytest.mark.parametrize(
    ("name", "way"), [*(("tied llama", way) for way in WAYS), ("bert with a tied head", "disk_offload")]
)
def test_a_narrower_stream(name, way, tmp_path):
    _, plan, wanted, given = pruned_in_memory(name, "stream")
    model = offloaded(way, tmp_path, MODELS[name][0], **MODELS[name][1])
    assert prune(model, data(model), WIDE).plan == plan
    assert same(weights(model), wanted)
    assert distance(outputs(model, tiny_batch(model)), given) == 0
    assert save_pretrained(model, tmp_path / "saved", max_shard_size="20KB") == 0


@pytest.mark.parametrize("way", WAYS)
def test_fewer_layers_and_the_search_for_them(way, tmp_path):
    config = PruningConfig(keep=0.6, metric="params", align=1, units=["layers", "neurons"], candidates=2)
    whole = tiny("LlamaForCausalLM")
    wanted = prune(whole, data(whole), config)
    model = offloaded(way, tmp_path, "LlamaForCausalLM")
    found = prune(model, data(model), config)
    assert found.plan == wanted.plan
    assert len(model.model.layers) < whole.config.num_hidden_layers + 1
    assert same(weights(model), weights(whole))
    stored = model.lm_head._hf_hook.weights_map.dataset
    entries = getattr(stored, "index", stored)
    assert not [key for key in entries if key.startswith("model.layers.1.")]  # what a dropped layer held is let go


@pytest.mark.parametrize("tied", [False, True])
def test_a_shorter_vocabulary(tied, tmp_path):
    tokenizer, config = qwen(), PruningConfig(keep=1.0, metric="params", units=["tokens"], criterion="magnitude")
    whole = model_for("llama", "LlamaForCausalLM", tokenizer, tie_word_embeddings=tied)
    model = disk_offload(copy.deepcopy(whole), tmp_path / "folder", execution_device="cpu")
    for each in (whole, model):
        prune(each, [texts_of(each, tokenizer, USED)], config, processing_class=tokenizer, vocabulary=USED)
    assert len(model.model.embed_tokens.weight) < len(tokenizer)
    assert same(weights(model), weights(whole))
    assert save_pretrained(model, tmp_path / "saved") == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("config", CUTS.values(), ids=CUTS)
def test_spread_over_memory_and_disk(config, tied, tmp_path):
    """What is in memory stays there; the rest is loaded; the model then runs, generates and saves as it did."""
    model = tiny("LlamaForCausalLM", tie_word_embeddings=tied, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "dense")
    ends = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    layers = {f"model.layers.{i}": place for i, place in enumerate(("disk", "cpu", "disk"))}
    spread = opened(model, tmp_path, ends | layers)
    before = placed(spread)
    assert prune(spread, data(model), config).plan == prune(model, data(model), config).plan
    assert placed(spread) == before
    batch = tiny_batch(model)
    ids = {"input_ids": batch["input_ids"][:2], "attention_mask": torch.ones_like(batch["input_ids"][:2])}
    asked = {**ids, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(spread.generate(**asked), model.generate(**asked))
    with pytest.warns(UserWarning, match="offloaded modules"):
        spread.save_pretrained(tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain").eval()
    assert distance(outputs(plain, batch), outputs(model, batch)) == 0
    assert save_pretrained(spread, tmp_path / "proven") == 0
    assert same(weights(spread), weights(model))


@pytest.mark.parametrize("way", WAYS)
def test_it_can_be_cut_again(way, tmp_path):
    model, whole = offloaded(way, tmp_path, "LlamaForCausalLM"), tiny("LlamaForCausalLM")
    for config in (CUT, PruningConfig(keep=0.8, metric="params", shapes="per_layer", align=1, repair="none")):
        wanted = prune(whole, data(whole), config).plan
        assert prune(model, data(model), plan=wanted, config=config).plan == wanted
        assert same(weights(model), weights(whole))


def test_logits_in_pieces_load_the_head_once(tmp_path, monkeypatch):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    batch, read = draw(model, data(model), 16, 0)[0], []
    monkeypatch.setattr(passes, "LOGITS", 2 * batch.size * model.config.vocab_size)
    plain = OffloadedWeightsLoader.__getitem__
    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", lambda self, key: read.append(key) or plain(self, key))
    found = passes.losses_of(model, batch)
    assert read.count("lm_head.weight") == 2  # once to see what the head is given
    assert torch.allclose(found, passes.losses_of(tiny("LlamaForCausalLM"), batch))


# --- memory ----------------------------------------------------------------------------------------------------------


class Watch:
    """Bytes of what was loaded from disk and is still there, at most: on modules, in graphs, or anywhere else."""

    def __init__(self, patch):
        self.alive, self.most = [], 0
        plain = OffloadedWeightsLoader.__getitem__
        patch.setattr(OffloadedWeightsLoader, "__getitem__", lambda loader, key: self.see(plain(loader, key)))

    def see(self, tensor):
        storage = tensor.untyped_storage()
        self.alive = [(ref, size) for ref, size in self.alive if not ref.expired()]
        self.alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.most = max(self.most, sum(size for _, size in self.alive))
        return tensor


@pytest.mark.parametrize(
    ("class_name", "config"),
    [("LlamaForCausalLM", CUT), ("LlamaForCausalLM", WIDE), ("BertForSequenceClassification", CUT)],
)
def test_about_one_layer_is_in_memory_at_once(class_name, config, tmp_path, monkeypatch):
    model = tiny(class_name, num_hidden_layers=6)
    layer = 4 * max(describe(model).layer_params.values())
    disk_offload(model, tmp_path / "folder", execution_device="cpu")
    watch = Watch(monkeypatch)
    prune(model, [tiny_batch(model, seed=seed) for seed in range(2)], config)
    assert layer <= watch.most < 1.3 * layer
    watch.most = 0
    save_pretrained(model, tmp_path / "saved", max_shard_size="20KB")
    assert 0 < watch.most < layer


# --- stopped ---------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stops(real, at, error):
    """A function that raises behind its n-th call."""
    calls = iter(range(1, 10**6))

    def stopping(*args, **kwargs):
        result = real(*args, **kwargs)
        if next(calls) == at:
            raise error
        return result

    return stopping


def stopped(model, home, error, config=CUT, match=None):
    """A cut raises, and nothing has changed: weights, where they lie, config; no file of ours is left."""
    given = outputs(
        model, tiny_batch(model)
    )  # first: what transformers reads off the labels, it writes into the config
    before, where, told, left = weights(model), placed(model), copy.deepcopy(model.config.to_dict()), ours(home)
    with pytest.raises(error, match=match):
        prune(model, data(model), config)
    gc.collect()
    assert same(weights(model), before)
    assert placed(model) == where
    assert model.config.to_dict() == told
    assert distance(outputs(model, tiny_batch(model)), given) == 0
    assert ours(home) == left


STAGES = {  # module, name, at which of its calls
    "the first cut": (cutting, "put_", 1),
    "a later cut": (cutting, "put_", 7),
    "a refitted weight": (width, "put_", 3),
    "a stored weight": (offload, "_store_", 12),
    "the config": (oneshot, "write_", 1),
}


@pytest.mark.parametrize(
    ("way", "cut"),
    [("cpu_offload", "stream"), ("disk_offload", "sites"), ("disk_offload", "stream"), ("device_map", "sites")],
)
def test_a_cut_that_is_stopped_changes_nothing(way, cut, tmp_path, monkeypatch):
    model = offloaded(way, tmp_path, "LlamaForCausalLM", **TIED)
    for module, name, at in STAGES.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stops(getattr(module, name), at, KeyboardInterrupt if at == 7 else Stop))
            stopped(model, tmp_path, (Stop, KeyboardInterrupt), CUTS[cut])
    prune(model, data(model), CUTS[cut])
    assert same(weights(model), pruned_in_memory("tied llama", cut)[2])


def test_a_pass_that_is_stopped_leaves_nothing_behind(tmp_path):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    before, down = placed(model), model.model.layers[1].mlp.down_proj
    down._old_forward = stops(down._old_forward, 1, Stop)  # behind it its hook would drop the weight
    with pytest.raises(Stop):
        prune(model, data(model), CUT)
    assert placed(model) == before


def test_a_full_disk_is_said_and_nothing_is_half_cut(tmp_path, monkeypatch):
    model, full = offloaded("device_map", tmp_path, "LlamaForCausalLM"), OSError(errno.ENOSPC, "No space left")
    with monkeypatch.context() as patch:
        patch.setattr(offload, "save_file", stops(offload.save_file, 9, full))
        stopped(
            model, tmp_path, OSError, match=r"cannot be written to the offload folder '.*folder'.*No space.*Make room"
        )
    assert prune(model, data(model), CUT).plan == pruned_in_memory("llama")[1]


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_replaced_stays_and_what_nobody_names_goes(tmp_path):
    """The files that a model was offloaded to are not ours to remove or to write to; those of a cut are."""
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    theirs = {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
    prune(model, data(model), CUT)
    once = ours(tmp_path)
    prune(model, data(model), CUT)
    gc.collect()
    assert once
    assert len(ours(tmp_path)) == len(once)
    assert not {*once} & {*ours(tmp_path)}
    del model
    gc.collect()
    assert ours(tmp_path) == []
    assert {path: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == theirs


def test_a_copy_is_cut_for_itself(tmp_path):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    prune(model, data(model), CUT)
    before, other = weights(model), copy.deepcopy(model)
    prune(other, data(other), CUT)
    gc.collect()
    assert same(weights(model), before)
    del model
    gc.collect()
    assert not same(weights(other), before)
    assert outputs(other, tiny_batch(other))


def test_the_checkpoint_that_weights_are_read_from_is_not_written_to(tmp_path):
    model = offloaded("device_map", tmp_path, "LlamaForCausalLM")
    before = (tmp_path / "dense" / "model.safetensors").read_bytes()
    prune(model, data(model), CUT)
    assert (tmp_path / "dense" / "model.safetensors").read_bytes() == before


# --- refused ---------------------------------------------------------------------------------------------------------


def test_no_folder_to_write_to(tmp_path):
    model = tiny("LlamaForCausalLM")
    model.save_pretrained(tmp_path / "dense")
    model = type(model).from_pretrained(tmp_path / "dense", device_map={"": "disk"}).eval()
    stopped(model, tmp_path, ValueError, match=r"read from the checkpoint itself.*offload_folder='some/directory'")
    assert save_pretrained(model, tmp_path / "saved") == 0  # which needs none


@pytest.mark.parametrize("way", ["disk_offload", "device_map"])
def test_the_folder_is_gone(way, tmp_path):
    model = offloaded(way, tmp_path, "LlamaForCausalLM")
    shutil.rmtree(tmp_path / "folder")
    with pytest.raises(FileNotFoundError, match=r"folder.* is not there \(any more\).*Load the model again"):
        prune(model, data(model), CUT)


def test_the_files_are_gone(tmp_path):
    model = offloaded("device_map", tmp_path, "LlamaForCausalLM")
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(FileNotFoundError, match=r"is offloaded to '.*model\.safetensors', which is not there"):
        prune(model, data(model), CUT)
    with pytest.raises(FileNotFoundError, match="is not there"):
        save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_folder_may_not_be_written_to(tmp_path, monkeypatch):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    monkeypatch.setattr(os, "access", lambda path, mode: "folder" not in str(path))
    stopped(model, tmp_path, PermissionError, match=r"Nothing may be written to the offload folder '.*folder'.*another")


def test_too_little_room_is_said_first(tmp_path, monkeypatch):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    size = describe(model).total_bytes
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(size, 0, int(0.69 * size)))
        stopped(model, tmp_path, OSError, match=r"folder '.*folder' has .* GB left; .* take up to .* GB.*Make room")
        patch.setattr(shutil, "disk_usage", lambda path: usage(size, 0, int(0.71 * size)))
        prune(model, data(model), CUT)


def test_weights_that_are_nowhere():
    with torch.device("meta"):
        model = tiny("LlamaForCausalLM")
    assert describe(model).sites
    batch = data(tiny("LlamaForCausalLM"))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is on the meta device: load the weights"):
        prune(model, batch, CUT)


def test_hooks_that_load_for_others():
    model = cpu_offload(tiny("LlamaForCausalLM"), execution_device="cpu", preload_module_classes=["LlamaMLP"])
    with pytest.raises(
        ValueError, match=r"mlp\.gate_proj\.weight is on the meta device.*without preload_module_classes"
    ):
        prune(model, data(model), CUT)


def test_weights_in_a_foreign_place():
    model = cpu_offload(tiny("LlamaForCausalLM"), execution_device="cpu")
    model.lm_head._hf_hook.weights_map = ("weight",)
    with pytest.raises(ValueError, match="is offloaded into a tuple, which cannot be written to"):
        prune(model, data(model), CUT)


@pytest.mark.parametrize("way", WAYS)
def test_latency_is_not_measured(way, tmp_path):
    model = offloaded(way, tmp_path, "BertForSequenceClassification")
    config = PruningConfig(keep=0.7, metric="latency")
    what = r"metric='latency' times the model, and weights of this .* are offloaded.*Load the model without"
    stopped(model, tmp_path, ValueError, config, what)
    analysis = analyze(model, data(model), CUT)
    plan = analysis.plan()
    plan.config.update(metric="latency", scope="model")
    before = weights(model)
    for cut in (lambda: prune(model, data(model), plan=plan), lambda: analysis.cut_(model, plan=plan)):
        with pytest.raises(ValueError, match=what):
            cut()
    with pytest.raises(ValueError, match="Latency is measured, and weights"):
        measure(model)
    assert measure(model, shapes=[])["parameters"] == sum(p.numel() for p in model.parameters())
    assert same(weights(model), before)


def test_it_does_not_train(tmp_path):
    model = offloaded("cpu_offload", tmp_path, "BertForSequenceClassification")
    before, batch = weights(model), rows(tiny_batch(tiny("BertForSequenceClassification")), slice(None))
    given = {"args": arguments(tmp_path / "run"), "train_dataset": [rows(batch, i) for i in range(8)]}
    with pytest.raises(
        ValueError, match=r"Training changes the weights themselves, and weights .* Load the model without"
    ):
        PruningTrainer(model=model, pruning=CUT, **given)
    student = tiny("BertForSequenceClassification")
    with pytest.raises(ValueError, match="The teacher is moved to where the student trains, and weights"):
        PruningTrainer(model=student, teacher=model, distillation=DistillationConfig(), **given)
    with pytest.raises(ValueError, match="Training changes the weights themselves"):
        PruningCallback(CUT)._start(model)
    assert same(weights(model), before)


def test_what_works_on_the_weights_themselves(tmp_path):
    model = offloaded("cpu_offload", tmp_path, "LlamaForCausalLM")
    plan = analyze(model, data(model), CUT).plan()
    with (
        pytest.raises(ValueError, match="Masks are put on the weights themselves, and weights"),
        masked(model, describe(model), plan),
    ):
        pass
    with pytest.raises(ValueError, match=r"model_type='mistral' puts the weights into another class, and weights"):
        save_pretrained(model, tmp_path / "saved", model_type="mistral")
    assert not (tmp_path / "saved").exists()


# --- the tool alone --------------------------------------------------------------------------------------------------


def test_real_is_nothing_where_nothing_is_offloaded():
    model = tiny("LlamaForCausalLM")
    weight = model.lm_head.weight
    with offload.real(*model.modules()):
        assert model.lm_head.weight is weight
    assert model.lm_head.weight is weight


def test_passes_inside_see_what_was_put_there(tmp_path):
    model = offloaded("disk_offload", tmp_path, "LlamaForCausalLM")
    head, x = model.lm_head, torch.randn(3, model.config.hidden_size)
    with offload.real(head), offload.real(head):
        cutting.put_(head, "weight", head.weight.detach()[:7] * 2)
        wanted = head(x)
        assert wanted.shape == (3, 7)
    assert head.weight.is_meta
    assert torch.equal(head(x), wanted)


def test_forward_is_put_back_as_accelerate_left_it(tmp_path):
    model = dispatch_model(tiny("LlamaForCausalLM"), {"": "cpu"}, force_hooks=True)
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert any(forwards)
    batch = draw(model, data(model), 16, 0)[0]
    sites = describe(model).sites
    gradients(model, sites, {site.key: site.sizes[site.inner.name] for site in sites}, batch)
    assert [vars(module).get("forward") for module in model.modules()] == forwards
