"""The losses between a pruned model and its teacher."""

from __future__ import annotations

import copy
import doctest

import pytest
import torch
from tiny import tiny, tiny_batch
from torch.nn import functional
from training import rows, trainer
from transformers import default_data_collator

from hf_prune import DistillationConfig, schedules
from hf_prune.model.batches import prepare
from hf_prune.train import distill
from hf_prune.train.distill import divergence, layer_map, relative_error
from hf_prune.train.teacher import Teacher, with_teacher_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens to refit")
ALL = {"logits_weight": 1.0, "hidden_weight": 1.0, "attention_weight": 1.0}
CLASSES = [
    "BertForSequenceClassification", "BertForQuestionAnswering", "BertForTokenClassification", "BertForMaskedLM",
    "LlamaForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration", "ViTForImageClassification",
    "OPTForCausalLM", "GPT2LMHeadModel",
]  # fmt: skip


def test_examples_in_the_docstrings():
    for module in (distill, schedules):
        assert doctest.testmod(module).failed == 0


def test_divergence_is_that_of_torch_at_any_chunk():
    student, teacher = torch.randn(2, 13, 7, dtype=torch.float64).unbind()
    a, b = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    wanted = functional.kl_div(a, b, reduction="batchmean", log_target=True) * 4
    for chunk in (1, 14, 21, 1000):
        assert divergence(student, teacher, 2.0, chunk).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert divergence(student, student, 2.0).item() == pytest.approx(0.0, abs=1e-7)
    assert divergence(student[:0], teacher[:0], 2.0) == 0


def test_divergence_has_the_gradient_of_the_whole():
    student, teacher = torch.randn(2, 13, 7).unbind()
    found = []
    for chunk in (7, 1000):
        leaf = student.clone().requires_grad_()
        divergence(leaf, teacher, 2.0, chunk).backward()
        found.append(leaf.grad)
    assert torch.allclose(*found, atol=1e-6)
    wanted = 2.0 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 13  # T² · (1/T) · (p - q) / n
    assert torch.allclose(found[0], wanted, atol=1e-6)


def test_a_regressed_value_has_its_squared_error():
    assert divergence(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]), 2.0) == pytest.approx(2.5)


def test_relative_error_counts_real_tokens_alone():
    student, teacher = torch.randn(2, 2, 3, 4).unbind()
    mask = torch.tensor([True, True, False, True, False, False])
    picked = relative_error(student.view(6, 4)[mask][None], teacher.view(6, 4)[mask][None], None)
    assert relative_error(student, teacher, mask) == pytest.approx(picked.item())
    assert relative_error(10 * student, 10 * teacher, mask) == pytest.approx(picked.item())  # in any unit


def test_layer_maps():
    assert layer_map(3, 3, None) == [0, 1, 2]
    assert layer_map(2, 6, None) == [2, 5]
    assert layer_map(2, 6, [0, 3]) == [0, 3]
    with pytest.raises(ValueError, match="The teacher has 2 layers, the student 3"):
        layer_map(3, 2, None)
    with pytest.raises(ValueError, match=r"layer_map=\[0, 9\]: give one of the teacher's layers 0\.\.5"):
        layer_map(2, 6, [0, 9])


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_has_nothing_to_learn_from_itself(name):
    """And something from another; whatever is padded does not matter."""
    model = tiny(name)
    batch = prepare(model, tiny_batch(model), torch.zeros(8))
    for teacher, same in ((copy.deepcopy(model), True), (tiny(name, seed=1), False)):
        distiller = Teacher(model, teacher, DistillationConfig(**ALL))
        with distiller.watched(model) as seen:
            loss, _ = distiller.loss(model, model(**batch.inputs), batch, seen)
        assert (loss.item() < 1e-6) == same
    assert loss.requires_grad


@pytest.mark.parametrize("term", ALL)
@pytest.mark.parametrize("name", ["BertForTokenClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_every_term_teaches(name, term):
    """A few steps along its gradient bring the student nearer."""
    student, teacher = tiny(name, seed=1), tiny(name)
    config = DistillationConfig(**dict.fromkeys(ALL, 0.0) | {term: 1.0})
    batch = prepare(student, tiny_batch(student), torch.zeros(8))
    distiller = Teacher(student, teacher, config)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    losses = []
    with distiller.watched(student) as seen:
        for _ in range(5):
            loss, _ = distiller.loss(student, student(**batch.inputs), batch, seen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_several_labels_and_regression():
    for problem, labels in (("multi_label_classification", torch.ones(8, 3)), ("regression", torch.ones(8, 3))):
        name = "BertForSequenceClassification"
        student, teacher = (tiny(name, seed=s, num_labels=3, problem_type=problem) for s in (0, 1))
        batch = prepare(student, {**tiny_batch(student), "labels": labels}, torch.zeros(8))
        distiller = Teacher(student, teacher, DistillationConfig(hidden_weight=0.0))
        with distiller.watched(student) as seen:
            assert distiller.loss(student, student(**batch.inputs), batch, seen)[0] > 1e-4


def test_the_teacher_is_the_model_before_the_cut(tmp_path):
    run = trainer(tmp_path, args={"max_steps": 2}, distillation=DistillationConfig())
    before = copy.deepcopy(run.model).eval()
    run.train()
    batch = tiny_batch(before)
    assert torch.equal(run._teacher.model(**batch).logits, before(**batch).logits)
    assert not any(p.requires_grad for p in run._teacher.model.parameters())


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "MobileNetV2ForImageClassification"])
def test_maps_of_pixels_are_compared(name, tmp_path):
    run = trainer(
        tmp_path, name, pruning={"keep": 0.72, "shapes": "per_layer", "align": 1},
        distillation=DistillationConfig(hidden_weight=1.0),
    )  # fmt: skip
    run.train()
    assert run.state.log_history


def test_a_teacher_of_other_stages_is_refused():
    student, teacher = (tiny("ResNetForImageClassification", hidden_sizes=sizes) for sizes in ([8, 12], [8, 16]))
    with pytest.raises(ValueError, match=r"are \[8, 16\] wide, the student's \[8, 12\]"):
        Teacher(student, teacher, DistillationConfig(hidden_weight=1.0))


def test_a_teacher_by_name_and_in_another_precision(tmp_path):
    name = "BertForSequenceClassification"
    tiny(name, num_hidden_layers=4).save_pretrained(tmp_path / "teacher")
    config = DistillationConfig(teacher=str(tmp_path / "teacher"), teacher_dtype="bfloat16")
    run = trainer(tmp_path / "run", args={"max_steps": 2}, distillation=config)
    run.train()
    assert run._teacher.model.dtype == torch.bfloat16
    assert run.model.dtype == torch.float32


def test_accumulated_batches_weigh_by_their_tokens(tmp_path):
    """Two batches of 4 accumulated are one batch of 8, however many labels each holds."""
    losses = []
    name = "LlamaForCausalLM"
    data = rows(tiny(name)).map(
        lambda row, i: {"labels": row["labels"][: 4 + i % 7] + [-100] * (8 - i % 7)}, with_indices=True
    )
    for size, steps in ((8, 1), (4, 2)):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        run = trainer(
            tmp_path, name, args={**args, "logging_steps": 1}, pruning=None, teacher=tiny(name, seed=1),
            distillation=DistillationConfig(hidden_weight=0.0), train_dataset=data,
        )  # fmt: skip
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_logits_from_disk_are_the_teacher_s(tmp_path):
    """The same losses, step by step, and no second model in memory."""
    name, losses = "BertForSequenceClassification", []
    config = DistillationConfig(hidden_weight=0.0)
    for known in (False, True):
        data = rows(tiny(name))
        data = with_teacher_logits(data, tiny(name), default_data_collator) if known else data
        args = {"max_steps": 4, "logging_steps": 1}
        run = trainer(tmp_path, name, args=args, distillation=config, train_dataset=data)
        run.train()
        assert (run._teacher.model is None) == known
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: must be a finite number above 0"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0: a weight is a number of at least 0"),
        ({"hidden_weight": 0.0, "logits_weight": 0.0}, "All distillation weights are 0"),
        ({"teacher_dtype": "int4"}, "teacher_dtype='int4' is not one of"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**changes)
