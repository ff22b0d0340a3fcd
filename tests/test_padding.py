"""Left padding: decoders see the same texts, so they get the same scores, plan and repaired weights as on the right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import cut, cut_everywhere, distance, layers_of, outputs, tiny_batch, tiny_model
from transformers.models.auto import modeling_auto

from hf_prune import PruningConfig, describe, prune
from hf_prune.model import layerwise
from hf_prune.model.batches import draw, forward_inputs, token_mask
from hf_prune.model.mask import masked
from hf_prune.model.weights import quiet
from hf_prune.oneshot import analyze
from hf_prune.score.statistics import rows_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")
FAMILIES = ("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
TABLES = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
HEADS = [(family, table[family]) for table in TABLES for family in FAMILIES]
LANGUAGE_MODELS = HEADS[: len(FAMILIES)]
AS_THE_BATCH_SAYS = "GPT2ForSequenceClassification"  # stock, it counts positions from the padding: see its own test
CRITERIA = ("fisher", "hessian", "activation")


def ragged(model: Any, seed: int, size: int = 16) -> dict[str, torch.Tensor]:
    """Right-padded texts of 5 to 12 tokens."""
    batch = tiny_batch(model, batch=size, seed=seed, padded=False)
    real = torch.arange(12) < 5 + torch.arange(size)[:, None] % 8
    batch["input_ids"] = batch["input_ids"].masked_fill(~real, 0)
    batch["attention_mask"] = real.long()
    if batch["labels"].dim() == 2:
        batch["labels"] = batch["labels"].masked_fill(~real, -100)
    return batch


def left(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same texts behind their padding."""
    padding = (batch["attention_mask"] == 0).sum(1).tolist()
    return {
        key: torch.stack([row.roll(shift) for row, shift in zip(value, padding, strict=True)])
        if value.dim() == 2
        else value
        for key, value in batch.items()
    }


def both_sides(model: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    right = [ragged(model, seed) for seed in range(4)]
    if type(model).__name__ == AS_THE_BATCH_SAYS:
        right = [{**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)} for batch in right]
    return right, [left(batch) for batch in right]


def assert_close(found: torch.Tensor, wanted: torch.Tensor, allowed: float, name: Any) -> None:
    assert (found - wanted).abs().max() <= allowed * wanted.abs().max(), name


@pytest.mark.parametrize(("family", "class_name"), HEADS)
def test_both_sides_give_the_same_scores(family, class_name):
    model = tiny_model(family, class_name)
    for criterion in CRITERIA:
        config = PruningConfig(keep=1.0, criterion=criterion)
        right, other = (analyze(model, data, config).scores for data in both_sides(model))
        for key in right:
            assert_close(other[key], right[key], 1e-3, (criterion, key))


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("family", "class_name"), HEADS)
def test_both_sides_give_the_same_plan_and_weights(family, class_name, criterion):
    config = PruningConfig(keep=0.7, metric="params", shapes="uniform", criterion=criterion)
    dense = tiny_model(family, class_name)
    models = [tiny_model(family, class_name) for _ in range(2)]
    right, other = (prune(model, data, config) for model, data in zip(models, both_sides(dense), strict=True))
    assert other.plan.kept == right.plan.kept
    assert any(repair["accepted"] for repair in right.report["repairs"])
    for (name, found), wanted in zip(models[1].state_dict().items(), models[0].state_dict().values(), strict=True):
        assert_close(found, wanted, 1e-2, name)


@pytest.mark.parametrize(("family", "class_name"), HEADS[len(FAMILIES) :])
def test_only_what_stock_gpt2_counts_itself_needs_positions_in_the_batch(family, class_name):
    """A classifier is scored as `model(**batch)` runs it: where that tells the sides apart, so does the score."""
    model = tiny_model(family, class_name)
    batch = ragged(model, 0)
    gap = distance(outputs(model, left(batch)), outputs(model, batch))
    assert (gap > 1e-2) == (class_name == AS_THE_BATCH_SAYS), gap


@pytest.mark.parametrize(("family", "class_name"), LANGUAGE_MODELS)
def test_texts_without_labels_are_scored_alike_on_both_sides(family, class_name):
    """Every token is a label but the first of a text, which is predicted from nothing, or from padding."""
    model = tiny_model(family, class_name)
    right, other = (
        analyze(
            model,
            [{key: value for key, value in batch.items() if key != "labels"} for batch in data],
            PruningConfig(keep=1.0, criterion="fisher"),
        ).scores
        for data in both_sides(model)
    )
    for key in right:
        assert_close(other[key], right[key], 1e-3, key)


@pytest.mark.parametrize(("family", "class_name"), HEADS)
def test_masked_equals_sliced_behind_left_padding(family, class_name):
    model = tiny_model(family, class_name)
    batch = left(ragged(model, 0))
    real = batch["attention_mask"].bool()
    anatomy = describe(model)
    plan = cut_everywhere(anatomy)

    def at_tokens() -> list[torch.Tensor]:
        return [x[real] if x.shape[:2] == real.shape else x for x in outputs(model, batch)]

    dense = at_tokens()
    with masked(model, anatomy, plan):
        expected = at_tokens()
    cut(model, plan)
    assert distance(at_tokens(), expected) <= 1e-4
    assert distance(expected, dense) > 1e-3


@pytest.mark.parametrize(("family", "class_name"), HEADS)
def test_streams_behind_left_padding_end_where_the_model_does(family, class_name):
    """Layer by layer, each real token has the hidden state that it has on the right."""
    model = tiny_model(family, class_name)
    anatomy = describe(model)
    layers = layers_of(model, anatomy, "decoder")
    ends = []
    for data in both_sides(model):
        batches = draw(model, data[:1], samples=16, seed=0)
        with quiet(model), torch.no_grad():
            stream = layerwise.capture(model, layers, [forward_inputs(model, batch) for batch in batches])
            (state,), mask = stream.states, token_mask(model, batches[0], "decoder")
            for layer, kwargs in zip(layers, stream.kwargs, strict=True):
                state = layerwise.run(layer, state, kwargs[0])[layerwise.OUTPUT]
        assert mask is not None
        ends.append(rows_of(state, mask))
    assert_close(ends[1], ends[0], 1e-4, "states")


@pytest.mark.parametrize(("family", "class_name"), LANGUAGE_MODELS)
def test_a_pruned_model_generates_the_same_behind_left_padding(family, class_name):
    model = tiny_model(family, class_name)
    prune(model, both_sides(model)[1], PruningConfig(keep=0.7, metric="params", shapes="per_layer"))
    model.generation_config.eos_token_id = None
    batch = left(ragged(model, 9, size=8))
    given = {key: batch[key] for key in ("input_ids", "attention_mask")}
    together = model.generate(**given, do_sample=False, max_new_tokens=4)[:, -4:]
    for row, ids in enumerate(given["input_ids"]):
        text = ids[given["attention_mask"][row].bool()][None]
        alone = model.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=4)
        assert together[row].tolist() == alone[0, -4:].tolist()
