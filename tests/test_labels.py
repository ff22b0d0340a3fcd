"""Labels, tokens and masks that do not fit the model are said before anything is scored; those that fit count."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import changed, snapshot, tiny, tiny_batch

from hf_prune import PruningConfig, analyze, prune
from hf_prune.model.batches import draw
from hf_prune.score.checks import fit_labels

CONFIG = {"keep": 0.95, "calibration_samples": 8, "sequence_length": 12}


def refused(model, data, match, **config):
    """analyze() raises, and the model is as it was."""
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        analyze(model, data, PruningConfig(**{**CONFIG, **config}))
    assert list(changed(before, model)) == []


def with_labels(name, labels, **changes):
    model = tiny(name, **changes)
    return model, [{**tiny_batch(model), "labels": labels}]


ONE_EACH = "BertForSequenceClassification"
EACH_TOKEN = "BertForTokenClassification"
FITS = {"problem_type": "multi_label_classification", "num_labels": 3}
REGRESSION = {"num_labels": 1}


def numbers(*values):
    return torch.tensor(values)


def tokens(model_labels, at=None):
    found = torch.zeros(8, 12, dtype=torch.long)
    found[0, 0] = model_labels
    return found


BAD_LABELS = [
    (ONE_EACH, {}, numbers(1, 2, 1, 2, 1, 2, 1, 2), r"hold 2; the model knows 0 to 1 .*count from 1: subtract 1"),
    (ONE_EACH, {}, numbers(0, 1, 0, 1, 0, 1, 0, 7), r"hold 7; the model knows 0 to 1 \(-100 does not count\)\.$"),
    (ONE_EACH, {}, numbers(0, 1, 0, 1, 0, 1, 0, 2), r"hold 2; the model knows 0 to 1 \(-100 does not count\)\.$"),
    (ONE_EACH, {}, numbers(0, 1, 0, 1, 0, 1, 0, -1), r"hold -1; the model knows 0 to 1"),
    (ONE_EACH, {}, torch.full((8,), -1), r"hold -1; the model knows 0 to 1"),
    (ONE_EACH, {}, torch.arange(8) * 1000, r"hold 1000, 2000, 3000, 4000, 5000, \.\.\.; the model knows 0 to 1"),
    (ONE_EACH, {}, torch.full((8,), -100), "No label counts: all are -100"),
    (ONE_EACH, {}, torch.tensor([0.0, 1.0] * 4), r"float32 \[8\]; .*multi_label.*each example is a whole number"),
    (ONE_EACH, {}, torch.zeros(8, 12, dtype=torch.long), r"labels are int64 \[8, 12\]; .* whole numbers \[B\]"),
    (ONE_EACH, {}, torch.zeros(8, 2, dtype=torch.long), r"labels are int64 \[8, 2\]; .*at once: floats \[B, 2\]"),
    (ONE_EACH, {}, torch.zeros(8, 3), r"labels are float32 \[8, 3\]; .*multi_label_classification"),
    (ONE_EACH, FITS, torch.zeros(8, 2), r"labels are float32 \[8, 2\]; .* learns from finite numbers \[B, 3\]"),
    (ONE_EACH, FITS, torch.full((8, 3), 2.0), r"labels hold 2\.0; .* learns from 0 to 1 for each label"),
    (ONE_EACH, FITS, torch.full((8, 3), -1.0), r"labels hold -1\.0; .* learns from 0 to 1"),
    (ONE_EACH, FITS, torch.full((8, 3), float("nan")), "learns from finite numbers"),
    (ONE_EACH, REGRESSION, torch.full((8,), float("inf")), "regression.* learns from finite numbers"),
    (ONE_EACH, REGRESSION, torch.zeros(8, 2), r"labels are float32 \[8, 2\]; .*regression"),
    (EACH_TOKEN, {}, tokens(2), "hold 2; the model knows 0 to 1"),
    (EACH_TOKEN, {}, tokens(-1), "hold -1; the model knows 0 to 1"),
    (EACH_TOKEN, {}, torch.zeros(8, 11, dtype=torch.long), r"int64 \[8, 11\]; .*every token: whole numbers \[8, 12\]"),
    (EACH_TOKEN, {}, torch.zeros(8, dtype=torch.long), r"int64 \[8\]; .*predicts every token"),
    (EACH_TOKEN, {}, torch.zeros(8, 12), r"float32 \[8, 12\]; .*predicts every token"),
    (EACH_TOKEN, {}, torch.zeros(8, 12, 2), r"float32 \[8, 12, 2\]; .*predicts every token"),
    (EACH_TOKEN, {}, torch.full((8, 12), -100), "No label counts"),
    ("BertForMaskedLM", {}, tokens(99), "hold 99; the model knows 0 to 98"),
    ("LlamaForCausalLM", {}, tokens(99), "hold 99; the model knows 0 to 98"),
    ("LlamaForCausalLM", {}, tokens(-5), "hold -5; the model knows 0 to 98"),
    ("LlamaForCausalLM", {}, torch.full((8, 12), -100), "No label counts"),
    ("LlamaForCausalLM", {}, torch.zeros(8, 5, dtype=torch.long), r"int64 \[8, 5\]; .*whole numbers \[8, 12\]"),
    ("GPT2ForSequenceClassification", {}, numbers(0, 1, 0, 1, 0, 1, 0, 5), "hold 5; the model knows 0 to 1"),
    ("ViTForImageClassification", {}, numbers(0, 1, 0, 1, 0, 1, 0, 9), "hold 9; the model knows 0 to 1"),
    ("T5ForConditionalGeneration", {}, torch.full((8, 9), 99), "holds 99; T5ForConditionalGeneration knows the tokens"),
    ("BartForSequenceClassification", {}, numbers(1, 2, 3, 1, 2, 3, 1, 2), "hold 3; the model knows 0 to 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "labels", "match"), BAD_LABELS)
def test_labels_that_do_not_fit(name, changes, labels, match):
    refused(*with_labels(name, labels, **changes), match)


@pytest.mark.parametrize(
    ("start", "end", "match"),
    [
        (torch.full((8,), -1), torch.zeros(8, dtype=torch.long), "start_positions hold -1; the model knows 0 and more"),
        (torch.zeros(8, dtype=torch.long), None, "end_positions is missing"),
        (torch.zeros(8), torch.zeros(8), r"start_positions is float32 \[8\]"),
        (torch.full((8,), 40), torch.full((8,), 50), "No label counts"),
        (torch.zeros(8, 2, dtype=torch.long), torch.zeros(8, dtype=torch.long), r"start_positions is int64 \[8, 2\]"),
    ],
)
def test_answers_that_do_not_fit(start, end, match):
    model = tiny("BertForQuestionAnswering")
    found = {"start_positions": start, "end_positions": end}
    refused(model, [{**tiny_batch(model), **found}], match)


def test_some_batches_without_labels():
    model = tiny(ONE_EACH)
    batch = tiny_batch(model)
    bare = {key: value for key, value in batch.items() if key != "labels"}
    short = {key: value[:, :8] for key, value in bare.items()}
    refused(model, [batch, short], "1 of 2 batches have no labels: label all of them, or none")


@pytest.mark.parametrize("criterion", ["hessian", "magnitude", "activation"])
def test_labels_that_no_one_reads_may_be_anything(criterion):
    model, data = with_labels(ONE_EACH, torch.full((8,), 7))
    assert analyze(model, data, PruningConfig(**CONFIG, criterion=criterion)).scores


def test_a_head_without_labels_says_how_it_is_scored():
    model = tiny(ONE_EACH)
    data = [{key: value for key, value in tiny_batch(model).items() if key != "labels"}]
    with pytest.warns(UserWarning, match="No labels: .*scored by 'hessian'"):
        assert analyze(model, data, PruningConfig(**CONFIG)).config.criterion == "hessian"
    analyze(model, data, PruningConfig(**CONFIG, criterion="hessian"))  # asked for: nothing to say


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_other_names_of_labels(name):
    model = tiny(ONE_EACH)
    batch = tiny_batch(model)
    renamed = {name if key == "labels" else key: value for key, value in batch.items()}
    found = [analyze(model, [data], PruningConfig(**CONFIG)) for data in (batch, renamed)]
    assert found[0].config.criterion == found[1].config.criterion == "fisher_obs"
    assert found[0].plan(0.95).hash == found[1].plan(0.95).hash


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (ONE_EACH, lambda labels: labels[:, None]),
        (ONE_EACH, lambda labels: labels.int()),
        (ONE_EACH, lambda labels: labels.bool()),
        (ONE_EACH, lambda labels: labels.to(torch.uint8)),
        (EACH_TOKEN, lambda labels: labels.int()),
        ("ViTForImageClassification", lambda labels: labels[:, None]),
    ],
)
def test_the_form_of_labels_does_not_matter(name, form):
    model = tiny(name)
    batch = tiny_batch(model)
    found = [
        analyze(model, [{**batch, "labels": labels}], PruningConfig(**CONFIG))
        for labels in (batch["labels"], form(batch["labels"]))
    ]
    assert found[0].config.criterion == found[1].config.criterion
    for key, scores in found[0].scores.items():
        assert torch.equal(scores, found[1].scores[key])


def test_labels_at_padding_do_not_count():
    """A collator that pads token labels with a class, not with -100."""
    model = tiny(EACH_TOKEN)
    batch = tiny_batch(model)
    padded = batch["labels"].masked_fill(batch["attention_mask"] == 0, 1)
    found = [
        analyze(model, [{**batch, "labels": labels}], PruningConfig(**CONFIG)) for labels in (batch["labels"], padded)
    ]
    for key, scores in found[0].scores.items():
        assert torch.equal(scores, found[1].scores[key])


def test_one_batch_is_fitted_like_another():
    """Batches of several lengths, each with labels of its own shape."""
    model = tiny(EACH_TOKEN)
    batch = tiny_batch(model, padded=False)
    short = {key: value[:, :7] for key, value in batch.items()}
    drawn = draw(model, [batch, short], 16, 0)
    fit_labels(model, drawn)
    assert {tuple(each.targets["labels"].shape) for each in drawn} == {(8, 12), (8, 7)}


# --- inputs ----------------------------------------------------------------------------------------------------------


def ids_of(value):
    return {"input_ids": value, "labels": torch.tensor([0, 1] * 4)}


BAD_INPUTS = [
    (ids_of(torch.full((8, 12), 99)), "input_ids holds 99; .* knows the tokens 0 to 98. Tokenise"),
    (ids_of(torch.full((8, 12), -1)), "input_ids holds -1; .* knows the tokens 0 to 98"),
    (ids_of(torch.ones(8, 12)), r"input_ids is float32 \[8, 12\]; token ids are whole numbers \[B, T\]"),
    (ids_of(torch.ones(8, 12, dtype=torch.bool)), r"input_ids is bool \[8, 12\]"),
    (ids_of(torch.ones(8, dtype=torch.long)), r"input_ids is int64 \[8\]; .*An example alone is \[1, T\]"),
    (ids_of(torch.ones(8, 2, 12, dtype=torch.long)), "cannot run what it is calibrated on"),
    (ids_of(torch.ones(8, 65, dtype=torch.long)), r"cannot run what it is calibrated on \(input_ids int64 \[2, 65\]"),
    (ids_of(torch.ones(8, 0, dtype=torch.long)), r"real tensors .*input_ids: int64 \[8, 0\]"),
    (ids_of(torch.ones(8, 12, dtype=torch.long, device="meta")), "real tensors .*input_ids: meta int64"),
    (ids_of(torch.ones(8, 12, dtype=torch.complex64)), "real tensors .*input_ids: complex64"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "attention_mask": torch.full((8, 12), float("inf"))}, "holds inf"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "attention_mask": torch.ones(8, 12, 1)}, r"float32 \[8, 12, 1\]"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "attention_mask": torch.ones(8)}, r"mask is float32 \[8\], "),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "token_type_ids": torch.ones(8).long()}, "cannot run what"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "position_ids": torch.ones(8).long()}, "cannot run what"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "token_type_ids": torch.eye(8, 12).long() * 9}, "cannot run"),
    (ids_of(torch.ones(8, 12, dtype=torch.uint8)), "cannot run what it is calibrated on .*uint8"),
    ({"labels": torch.tensor([0, 1] * 4)}, "reads input_ids; the batches hold no input"),
    ({"attention_mask": torch.ones(8, 12), "labels": torch.tensor([0, 1] * 4)}, "reads input_ids; .* attention_mask"),
    ({"pixel_values": torch.ones(8, 3, 16, 16)}, "reads input_ids; the batches hold no input"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "attention_mask": torch.zeros(8, 12)}, "mask is 0 every"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "attention_mask": torch.ones(8, 11)}, r"\[8, 11\].*\[8, 12\]"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "token_type_ids": torch.full((8, 12), 9)}, "cannot run what"),
    ({**ids_of(torch.ones(8, 12, dtype=torch.long)), "position_ids": torch.full((8, 12), 99)}, "cannot run what"),
    ({"input_ids": [[1] * 12] * 8}, "real tensors that agree .*input_ids: list"),
    ({"input_ids": torch.ones(8, 12, dtype=torch.long), "labels": ["good"] * 8}, "labels: list"),
    ({"input_ids": torch.ones(8, 12, dtype=torch.long), "label": "good"}, "labels: str"),
    ({"input_ids": torch.ones(8, 12, dtype=torch.long), "labels": torch.zeros(7)}, r"labels: float32 \[7\]"),
    ({"input_ids": torch.tensor(3)}, r"input_ids: int64 \[\]"),
    ("text", "A batch is a str"),
    (3, "A batch is a int"),
    (None, "A batch is a NoneType"),
    ([1, 2], "A batch is a list"),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "match"), BAD_INPUTS)
@pytest.mark.filterwarnings("ignore:No labels")
def test_inputs_that_the_model_cannot_read(batch, match):
    refused(tiny(ONE_EACH), [batch], match)


@pytest.mark.parametrize("data", [None, 3, "text", {}, {"input_ids": torch.ones(8, 4)}, torch.nn.Linear(2, 2), len])
def test_data_in_no_form_that_is_known(data):
    refused(tiny(ONE_EACH), data, "list or iterable of batches")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite(value):
    model = tiny("ViTForImageClassification")
    refused(model, [{**tiny_batch(model), "pixel_values": torch.full((8, 3, 16, 16), value)}], "NaN or infinite")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"input_ids": [[5, 6]] * 9, "labels": ["good"] * 9}, r"columns \['labels'\] hold strings"),
        ({"input_ids": [[5, 6]] * 9, "label": ["good"] * 9}, r"columns \['label'\] hold strings"),
        ({"input_ids": ["5 6"] * 9, "labels": [1] * 9}, r"columns \['input_ids'\] hold strings"),
        ({"labels": [1] * 9}, "hold no input of BertForSequenceClassification"),
        ({"text": ["a"] * 9, "label": [1] * 9}, "hold no input of BertForSequenceClassification"),
        ({"input_ids": [[5, 6]] * 9, "labels": [2] * 9}, "hold 2; the model knows 0 to 1"),
        ({"input_ids": [[5, 600]] * 9, "labels": [1] * 9}, "holds 600; .*tokens 0 to 98"),
        ({"input_ids": [[5, 6]] * 7, "labels": [1] * 7}, "7 calibration examples: at least 8"),
    ],
)
def test_datasets_that_do_not_fit(columns, match):
    from datasets import Dataset

    refused(tiny(ONE_EACH), Dataset.from_dict(columns), match)


def test_a_datasets_label_column_counts():
    from datasets import Dataset

    model = tiny(ONE_EACH)
    data = Dataset.from_dict({"input_ids": [[5 + i, 6, 7] for i in range(16)], "label": [0, 1] * 8})
    assert analyze(model, data, PruningConfig(**CONFIG)).config.criterion == "fisher_obs"


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", [None, "fisher", "taylor"])
def test_scores_that_tell_nothing(criterion):
    """A head of zeros, as fresh ones are: no gradient reaches a unit."""
    model = tiny(ONE_EACH)
    with torch.no_grad():
        model.classifier.weight.zero_()
    refused(model, [tiny_batch(model)], r"All \w+ scores are equal \(0\)", criterion=criterion)


@pytest.mark.filterwarnings("ignore:.*tokens to refit")
def test_an_analysis_cuts_without_scoring_again(monkeypatch):
    """Several targets from one pass: copies come out as from a pass of their own."""
    import copy

    from hf_prune.score import scoring

    model = tiny(ONE_EACH)
    data = [tiny_batch(model, batch=16)]
    config = PruningConfig(keep=0.9, align=1, shapes="per_layer", calibration_samples=16)
    wanted = prune(copy.deepcopy(model), data, config).model.state_dict()
    analysis = analyze(model, data, config)
    monkeypatch.setattr(scoring, "statistics", lambda *_: pytest.fail("scored again"))
    less, same = copy.deepcopy(model), copy.deepcopy(model)
    assert analysis.cut_(less, keep=0.8).report["keep"] <= 0.8
    analysis.cut_(same)
    assert all(torch.equal(value, wanted[name]) for name, value in same.state_dict().items())


def test_an_analysis_of_another_model_is_refused():
    model, other = tiny(ONE_EACH), tiny(ONE_EACH, intermediate_size=64)
    analysis = analyze(model, [tiny_batch(model)], PruningConfig(**CONFIG, criterion="magnitude"))
    before = snapshot(other)
    with pytest.raises(ValueError, match="2 places differ"):
        analysis.cut_(other)
    assert list(changed(before, other)) == []


# --- models ----------------------------------------------------------------------------------------------------------


def compiled():
    return torch.compile(tiny(ONE_EACH))


def adapted():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny(ONE_EACH), LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))


def in_parallel():
    return torch.nn.DataParallel(tiny(ONE_EACH))


@pytest.mark.filterwarnings("ignore:.*(script_method|gradient_checkpointing).* is deprecated")  # of torch and peft
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (compiled, r"torch\.compile.*hand over model\._orig_mod"),
        (adapted, r"peft.*hand over model\.merge_and_unload\(\)"),
        (in_parallel, r"data parallelism.*hand over model\.module"),
        (lambda: torch.nn.Linear(2, 2), "PreTrainedModel, got .*Linear. Open one with from_pretrained"),
        (lambda: "bert-base-uncased", "PreTrainedModel, got builtins.str"),
        (lambda: None, "PreTrainedModel, got builtins.NoneType"),
        (lambda: transformers.BertModel, "PreTrainedModel, got builtins.type"),
    ],
)
def test_wrappers_say_how_to_get_at_the_model(make, match):
    with pytest.raises(TypeError, match=match):
        prune(make(), [tiny_batch(tiny(ONE_EACH))], PruningConfig(**CONFIG))


def test_adapters_inside_the_model():
    """On one of the later layers, as inject_adapter_in_model leaves them."""
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny(ONE_EACH)
    config = LoraConfig(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer")
    model = inject_adapter_in_model(config, model)
    refused(model, [tiny_batch(model)], r"layer\.1\.attention\.self\.query has an adapter.*merge_and_unload")
