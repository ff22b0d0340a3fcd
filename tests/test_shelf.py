"""Lists of tensors in memory and in a file, and what is captured in front of a model's layers."""

from __future__ import annotations

import errno
import gc
import tempfile

import pytest
import torch
from tiny import EVERY_CLASS, tiny, tiny_batch

from hf_prune import PruningConfig, describe, prune
from hf_prune.model import layerwise, shelf
from hf_prune.model.batches import draw, forward_inputs
from hf_prune.model.shelf import Shelf

SMALL = torch.arange(6.0)  # 24 bytes


def test_beyond_the_room_tensors_lie_in_a_file():
    some = Shelf(room=50)
    first, second = some.list([SMALL]), some.list()
    second.extend([SMALL + 1, SMALL.view(2, 3).bfloat16(), torch.tensor([True, False]), SMALL.view(3, 2).T])
    assert first.in_memory + second.in_memory <= 50
    expected = [SMALL + 1, SMALL.view(2, 3).bfloat16(), torch.tensor([True, False]), SMALL.view(3, 2).T]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(second, expected, strict=True))
    second[1], second[3] = SMALL, torch.zeros(100)  # smaller and larger than what was there
    assert torch.equal(second[1], SMALL)
    assert torch.equal(second[3], torch.zeros(100))
    assert torch.equal(second[0], SMALL + 1)
    assert second.pop().numel() == 100
    assert len(second) == 3
    assert torch.equal(second[1:][0], SMALL)


def test_room_is_given_back():
    some = Shelf(room=24)
    kept = some.list([SMALL])
    assert not some.has_room(1)
    kept[0] = SMALL[:2].clone()
    assert some.has_room(16)
    del kept
    gc.collect()
    assert some.has_room(24)


def test_a_full_disk_is_said(monkeypatch):
    class Full:
        def seek(self, offset):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: Full())
    with pytest.raises(OSError, match=r"No room for 0 MiB in .*Set TMPDIR"):
        Shelf(room=0).list([SMALL])


def test_a_cut_from_a_file_is_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def cut(room):
        monkeypatch.setattr(shelf.Shelf, "beside", classmethod(lambda cls, model: cls(room)))
        model = tiny("LlamaForCausalLM")
        prune(model, [tiny_batch(model, seed=i) for i in range(3)], PruningConfig(keep=0.6, metric="params"))
        return model.state_dict()

    whole, filed = cut(float("inf")), cut(0)
    assert all(torch.equal(whole[name], filed[name]) for name in whole)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("class_name", [name for _, name in EVERY_CLASS])
def test_layers_are_skipped_only_where_nothing_depends_on_them(class_name, monkeypatch):
    """What is captured is what all batches run through all layers give."""
    model = tiny(class_name)
    inputs = [
        forward_inputs(model, each) for seed in range(3) for each in draw(model, [tiny_batch(model, seed=seed)], 8, 0)
    ]
    for extent in (extent for extent in describe(model).extents if extent.path):
        layers = [model.get_submodule(path) for path in extent.layers]
        found = layerwise.capture(model, layers, inputs)
        with monkeypatch.context() as patch:
            patch.setattr(layerwise._Record, "depends_on_no_layer", lambda *args: False)
            expected = layerwise.capture(model, layers, inputs)
        assert found.loops == expected.loops
        assert layerwise._alike([*found.states], [*expected.states])
        for ours, theirs in zip(found.kwargs, expected.kwargs, strict=True):
            assert [sorted(each) for each in ours] == [sorted(each) for each in theirs]
            assert all(_close(a, b) for a, b in zip(ours, theirs, strict=True))


def _close(a, b):
    """Equal tensors, wherever they are."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_close, a, b))
    return type(a) is type(b)
