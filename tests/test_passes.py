"""Passes in little memory: layers that are run again, logits in pieces. The same numbers, and less memory."""

from __future__ import annotations

import pytest
import torch
from tiny import EVERY_CLASS, singles, tiny, tiny_batch
from torch.autograd.graph import saved_tensors_hooks

from hf_prune import describe
from hf_prune.model.batches import draw
from hf_prune.score import passes
from hf_prune.score.losses import example_losses
from hf_prune.score.statistics import gradients

LANGUAGE = ("CausalLM", "LMHead", "ConditionalGeneration")
every_language_model = pytest.mark.parametrize(
    "class_name", [name for _, name in EVERY_CLASS if name.endswith(LANGUAGE) or "LMHead" in name]
)


def drawn_batch(model):
    return draw(model, [tiny_batch(model)], 8, 0)[0]


def scored(model, batch):
    """Gradients of the gates and at the tokens, and what was kept for the backward pass, in bytes."""
    sites, kept = describe(model).sites, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        found = gradients(model, sites, {site.key: site.sizes[site.inner.name] for site in sites}, batch)
    return found, sum(kept.values())


@every_language_model
def test_logits_in_pieces_give_the_same_losses_and_gradients(class_name, monkeypatch):
    model = tiny(class_name)
    batch = drawn_batch(model)
    with torch.no_grad():
        expected = example_losses(model, model(**batch.inputs, use_cache=False), batch)
    whole, _ = scored(model, batch)
    monkeypatch.setattr(passes, "LOGITS", 2 * batch.size * model.get_output_embeddings().weight.shape[0])
    torch.testing.assert_close(passes.losses_of(model, batch), expected, rtol=1e-5, atol=1e-6)
    pieces, _ = scored(model, batch)
    for name in ("gates", "tokens"):
        for key, value in getattr(whole, name).items():
            torch.testing.assert_close(getattr(pieces, name)[key], value, rtol=1e-3, atol=1e-5 * float(value.max()))


def test_pieces_are_no_larger_than_asked(monkeypatch):
    model = tiny("LlamaForCausalLM")
    batch, vocabulary, seen = drawn_batch(model), model.config.vocab_size, []
    monkeypatch.setattr(passes, "LOGITS", 3 * batch.size * vocabulary)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    passes.losses_of(model, batch)
    assert max(seen) == 3 * batch.size * vocabulary
    assert sum(seen[1:]) == batch.size * (batch.inputs["input_ids"].shape[1] - 1) * vocabulary


def test_a_model_is_as_it_was(monkeypatch):
    """Also after an error in the middle."""
    model = tiny("LlamaForCausalLM")
    batch, before = drawn_batch(model), [dict(module.__dict__) for module in model.modules()]
    monkeypatch.setattr(passes, "LOGITS", 1)
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(passes, "token_losses", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                scored(model, batch)
        else:
            scored(model, batch)
        assert [{*module.__dict__} for module in model.modules()] == [{*each} for each in before]
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_what_is_kept_for_the_backward_pass_hardly_grows_with_depth(monkeypatch):
    kept = {}
    for layers in (2, 8):
        model = tiny("LlamaForCausalLM", num_hidden_layers=layers)
        batch = drawn_batch(model)
        kept[layers] = scored(model, batch)[1]
    with monkeypatch.context() as patch:
        patch.setattr("hf_prune.score.statistics.recomputed", lambda layers: passes.recomputed([]))
        without = scored(model, batch)[1]
    state = batch.inputs["input_ids"].numel() * model.config.hidden_size * 4
    assert kept[8] - kept[2] <= 6 * 2 * state  # the input of each of the six, and what it is called with
    assert without > 3 * kept[8]


def test_one_example_at_a_time_is_the_same():
    model = tiny("LlamaForCausalLM")
    whole, _ = scored(model, drawn_batch(model))
    alone = [scored(model, batch)[0] for batch in draw(model, singles(tiny_batch(model)), 8, 0)]
    for key, value in whole.gates.items():
        torch.testing.assert_close(torch.cat([each.gates[key] for each in alone]), value, rtol=1e-3, atol=1e-7)
