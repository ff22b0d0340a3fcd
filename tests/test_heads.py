"""Every head that the Auto classes of transformers know for a family is pruned, repaired, saved and reopened."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tiny import FIXED, FIXED_CLASSES, changed, distance, outputs, snapshot, tiny_batch, tiny_model, within_reach
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_prune import PruningConfig, describe, prune, save_pretrained
from hf_prune.decide.costs import cost_model
from hf_prune.model.probe import probe_inputs
from hf_prune.repair.walk import improvement

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens to refit:UserWarning")
CHOICES = 3
PATCHES = 16


def auto_heads() -> list[tuple[str, str]]:
    """(family, class) of all that an Auto class builds from the family's own config."""
    tables = [vars(modeling_auto)[name] for name in vars(modeling_auto) if re.fullmatch(r"MODEL_.*_NAMES", name)]
    found = set()
    for family in FIXED:
        entries = [table.get(family, ()) for table in tables]
        names = {name for entry in entries for name in ([entry] if isinstance(entry, str) else entry)}
        for name in names:
            wanted = getattr(transformers, name).config_class  # a head over a model of another config is none of ours
            if wanted is not None and issubclass(CONFIG_MAPPING[family], wanted):
                found.add((family, name))
    return sorted(found)


HEADS = auto_heads()
FAMILY_OF_HEAD = {name: family for family, name in HEADS}
every_head = pytest.mark.parametrize(("family", "class_name"), HEADS, ids=[name for _, name in HEADS])


def only_inputs(batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if not key.endswith(("labels", "label"))}


def choices(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """[B, C, T]: each choice is the text in another order of examples."""
    size = len(batch["input_ids"])
    turned = {
        key: torch.stack([batch[key].roll(shift, 0) for shift in range(CHOICES)], 1)
        for key in ("input_ids", "attention_mask")
    }
    return {**turned, "labels": torch.randint(CHOICES, (size,), generator=generator)}


def sentences(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**batch, "labels": torch.randint(2, (len(batch["input_ids"]),), generator=generator)}


def replaced_tokens(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**batch, "labels": torch.randint(2, batch["input_ids"].shape, generator=generator)}


def words_and_sentences(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    next_sentence = torch.randint(2, (len(batch["input_ids"]),), generator=generator)
    return {**batch, "labels": batch["input_ids"], "next_sentence_label": next_sentence}


def masked_patches(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    drawn = torch.rand(len(batch["pixel_values"]), PATCHES, generator=generator) < 0.5
    return {"pixel_values": batch["pixel_values"], "bool_masked_pos": drawn}


def both_sides(batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    return {**batch, "decoder_input_ids": batch["input_ids"].roll(1, 1)}


FITTED: dict[str, Callable[[dict[str, Any], torch.Generator], dict[str, Any]]] = {  # where `tiny_batch` does not fit
    "MultipleChoice": choices,
    "NextSentencePrediction": sentences,
    "MaskedImageModeling": masked_patches,
    "ElectraForPreTraining": replaced_tokens,
    "BertForPreTraining": words_and_sentences,
    "ViTModel": only_inputs,
    "T5Model": both_sides,
}
CHANGES = {"MaskedImageModeling": {"encoder_stride": 4}}  # of the config: as wide as its patches
NO_LOSS_KNOWN = {"BertForPreTraining", "ElectraForPreTraining"}


def by_name(table: dict[str, Any], class_name: str, default: Any) -> Any:
    return next((value for ending, value in table.items() if class_name.endswith(ending)), default)


def head(family: str, class_name: str) -> Any:
    return tiny_model(family, class_name, **by_name(CHANGES, class_name, {}))


def batch_of(model: Any, seed: int = 0, size: int = 16) -> dict[str, Any]:
    """Right-padded texts or images, with the labels of the head."""
    fit = by_name(FITTED, type(model).__name__, lambda batch, _: batch)
    return fit(tiny_batch(model, batch=size, seed=seed), torch.Generator().manual_seed(seed))


def taught(batch: dict[str, Any]) -> bool:
    return bool({"labels", "start_positions"} & set(batch))


def test_the_heads_are_those_of_auto_and_more_than_our_own():
    assert {*FIXED_CLASSES} <= {*HEADS}
    assert {family for family, _ in HEADS} == {*FIXED}
    kinds = {"MultipleChoice", "QuestionAnswering", "TokenClassification", "NextSentencePrediction", "PreTraining"}
    assert kinds <= {name.partition("For")[2] for _, name in HEADS}


@every_head
def test_every_head_is_pruned_and_reopens(tmp_path, family, class_name):
    """Heads and neurons, on padded texts; scored by what the head is taught, or by 'hessian' where that is nothing."""
    model = head(family, class_name)
    data = [batch_of(model, seed) for seed in range(3)]
    if class_name in NO_LOSS_KNOWN:
        data = [only_inputs(batch) for batch in data]
    criterion = None if taught(data[0]) else "hessian"
    config = PruningConfig(metric="params", shapes="uniform", units=["heads", "neurons"], criterion=criterion)
    report = prune(model, data, within_reach(model, config)).report
    assert (report["criterion"] == "hessian") == (not taught(data[0]))
    running = {site.name for site in describe(model).sites if site.active}
    assert improvement([repair for repair in report["repairs"] if repair["site"] in running]) < 1
    save_pretrained(model, tmp_path / "m", data)
    again = getattr(transformers, class_name).from_pretrained(tmp_path / "m").eval()
    assert distance(outputs(again, data[0]), outputs(model, data[0])) <= 1e-5


@pytest.mark.parametrize("class_name", sorted(NO_LOSS_KNOWN))
def test_labels_without_a_known_loss_are_refused(class_name):
    """Two losses at once, or one number a token: said before anything is scored, with the way out."""
    model = head(FAMILY_OF_HEAD[class_name], class_name)
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{class_name}.*hessian"):
        prune(model, [batch_of(model)], PruningConfig(keep=0.9, metric="params"))
    assert list(changed(before, model)) == []


@every_head
def test_macs_of_every_head_match_the_flop_counter(family, class_name):
    """The anatomy runs nothing: it knows which matrices outside the blocks see every token, and which an example."""
    model = tiny_model(family, class_name, attn_implementation="eager")
    anatomy, length = describe(model), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**probe_inputs(model, length))
    counted = counter.get_total_flops() / 2
    assert cost_model(anatomy, "macs", length, "model").total(anatomy.sizes) == pytest.approx(counted, rel=0.01)
