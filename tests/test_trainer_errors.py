"""What a careless user may give a PruningTrainer: each a clear error, before anything is changed."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import changed, snapshot, tiny, tiny_model
from training import arguments, config, rows, trainer
from transformers import BertModel, Trainer, TrainingArguments

from hf_prune import DistillationConfig, PruningCallback, PruningConfig, PruningTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tokens to refit"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),  # torch.compile
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft
]
NAME = "BertForSequenceClassification"
LORA = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
LEARN = {"distillation": DistillationConfig()}


def refused(out, error, message, **given):
    """A trainer is refused, or its run before the first step; the model is as it was, bit by bit."""
    model = given.pop("model", None) or tiny(given.pop("class_name", NAME))
    before = {name: value for name, value in snapshot(model).items() if name != "training"}
    with pytest.raises(error, match=message):
        trainer(out, model=model, **given).train()
    # which the stock Trainer turns off
    before["config"] |= {key: value for key, value in model.config.to_dict().items() if key == "use_cache"}
    assert list(changed(before, model)) == []


# --- the model -------------------------------------------------------------------------------------------------------

MODELS = {
    "with adapters": (
        lambda: get_peft_model(tiny(NAME), LoraConfig(**LORA)), ValueError, "has adapters, which cannot be cut",
    ),
    "compiled": (lambda: torch.compile(tiny(NAME)), TypeError, r"is a wrapper .*hand over model\._orig_mod"),
    "in parallel": (lambda: torch.nn.DataParallel(tiny(NAME)), TypeError, r"is a wrapper .*hand over model\.module"),
    "a plain module": (lambda: torch.nn.Linear(2, 2), TypeError, "takes a transformers PreTrainedModel, got torch"),
    "a sequence": (lambda: torch.nn.Sequential(tiny(NAME)), TypeError, "takes a transformers PreTrainedModel, got"),
    "a config": (lambda: tiny(NAME).config, TypeError, "takes a transformers PreTrainedModel, got"),
    "a class": (lambda: type(tiny(NAME)), TypeError, "takes a transformers PreTrainedModel, got"),
    "weights": (lambda: tiny(NAME).state_dict(), TypeError, "takes a transformers PreTrainedModel, got"),
}  # fmt: skip


@pytest.mark.parametrize("what", MODELS)
def test_models_that_cannot_be_cut(tmp_path, what):
    make, error, message = MODELS[what]
    with pytest.raises(error, match=message):
        PruningTrainer(model=make(), args=arguments(tmp_path), train_dataset=[], pruning=config())
    with pytest.raises(error, match=message):
        PruningTrainer(make(), arguments(tmp_path), pruning=config())


def test_a_model_init_that_makes_something_else(tmp_path):
    with pytest.raises(TypeError, match="takes a transformers PreTrainedModel, got torch"):
        PruningTrainer(
            model_init=lambda: torch.nn.Linear(2, 2), args=arguments(tmp_path), train_dataset=[], pruning=config()
        )


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = [
    ("pruning", {"keep": 0.5}, r"takes a PruningConfig, got dict .*Write PruningConfig\(\*\*pruning\)"),
    ("pruning", "magnitude", "takes a PruningConfig, got str 'magnitude'"),
    ("pruning", 0.5, "takes a PruningConfig, got float 0.5"),
    ("pruning", True, "takes a PruningConfig, got bool True"),
    ("pruning", PruningConfig, "takes a PruningConfig, got the class PruningConfig"),
    ("pruning", DistillationConfig(), "takes a PruningConfig, got DistillationConfig"),
    ("pruning", [config()], "takes a PruningConfig, got list"),
    ("distillation", {"temperature": 2.0}, r"takes a DistillationConfig, got dict .*Write DistillationConfig\(\*\*"),
    ("distillation", "teacher", "takes a DistillationConfig, got str 'teacher'"),
    ("distillation", True, "takes a DistillationConfig, got bool"),
    ("distillation", config(), "takes a DistillationConfig, got PruningConfig"),
    ("distillation", DistillationConfig, "takes a DistillationConfig, got the class DistillationConfig"),
    ("peft_config", LORA, "takes a PeftConfig, got dict"),
    ("peft_config", "lora", "takes a PeftConfig, got str 'lora'"),
    ("peft_config", LoraConfig, "takes a PeftConfig, got the class LoraConfig"),
    ("peft_config", [LoraConfig(**LORA)], "takes a PeftConfig, got list"),
]


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS)
def test_settings_of_another_type(tmp_path, name, value, message):
    given = {"model": tiny(NAME), "args": arguments(tmp_path), "train_dataset": [], "pruning": config(), name: value}
    with pytest.raises(TypeError, match=f"^{name}= {message}"):
        PruningTrainer(**given)


ADAPTERS = {
    "no such layer": (lambda: LoraConfig(target_modules=["nope"]), "does not fit BertForSeq.*[Tt]arget modules"),
    "a number as layer": (lambda: LoraConfig(target_modules=[3]), "peft_config= does not fit"),
    "rank 0": (lambda: LoraConfig(**LORA, r=0), "does not fit .*`r` should be a positive integer"),
    "prompts": (
        lambda: PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2), "prompts are no weights of the model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", ADAPTERS)
def test_adapters_that_do_not_fit(tmp_path, what):
    make, message = ADAPTERS[what]
    refused(tmp_path, ValueError, message, peft_config=make())


def test_adapters_without_pruning(tmp_path):
    refused(tmp_path, ValueError, "peft_config= without pruning=", pruning=None, peft_config=LoraConfig(**LORA))


def test_two_that_cut(tmp_path):
    refused(tmp_path, ValueError, "both cut the model", callbacks=[PruningCallback(config())])


# --- the teacher -----------------------------------------------------------------------------------------------------

TEACHERS = {
    "a directory": (NAME, lambda: "teacher", TypeError, r"takes a model, got str 'teacher'.*DistillationConfig\(t"),
    "a config": (NAME, lambda: tiny(NAME).config, TypeError, "takes a model, got BertConfig"),
    "a class": (NAME, lambda: BertModel, TypeError, "takes a model, got type"),
    "a plain module": (NAME, lambda: torch.nn.Linear(2, 2), TypeError, "takes a transformers PreTrainedModel, got"),
    "with adapters": (
        NAME, lambda: get_peft_model(tiny(NAME), LoraConfig(**LORA)), TypeError, "a wrapper .*merge_and_unload",
    ),
    "compiled": (NAME, lambda: torch.compile(tiny(NAME)), TypeError, r"a wrapper .*hand over model\._orig_mod"),
    "a smaller vocabulary": (NAME, lambda: tiny(NAME, vocab_size=50), ValueError, "vocab_size is 50, the student's 99"),
    "another vocabulary": (
        "LlamaForCausalLM", lambda: tiny("LlamaForCausalLM", vocab_size=120), ValueError, "vocabulary: 120 entries",
    ),
    "no head": (NAME, lambda: tiny(NAME).bert, ValueError, r"teacher \(BertModel\) has no head.*logits_weight=0"),
    "words for classes": (
        NAME, lambda: tiny("BertForMaskedLM"), ValueError, r"MaskedLM\) has another head than the student",
    ),
    "tokens for examples": (
        NAME, lambda: tiny("BertForTokenClassification"), ValueError, "has another head than the student",
    ),
    "answers for examples": (
        NAME, lambda: tiny("BertForQuestionAnswering"), ValueError, "has another head than the student",
    ),
    "a language model": (NAME, lambda: tiny("LlamaForCausalLM"), ValueError, "has another head than the student"),
    "images": (NAME, lambda: tiny("ViTForImageClassification"), ValueError, "reads pixel_values, the student"),
    "larger images": (
        "ViTForImageClassification", lambda: tiny("ViTForImageClassification", image_size=32), ValueError,
        "image_size is 32, the student's 16",
    ),
    "less deep": (NAME, lambda: tiny(NAME, num_hidden_layers=1), ValueError, "teacher has 1 layers, the student 2"),
    "another width": (NAME, lambda: tiny(NAME, hidden_size=64), ValueError, "64 wide, the student's 32"),
    "more classes": (NAME, lambda: tiny(NAME, num_labels=5), ValueError, "another label space: 5 entries"),
}  # fmt: skip


@pytest.mark.parametrize("what", TEACHERS)
def test_teachers_that_cannot_teach(tmp_path, what):
    student, make, error, message = TEACHERS[what]
    refused(tmp_path, error, message, class_name=student, teacher=make(), **LEARN)


def test_a_model_is_not_its_own_teacher(tmp_path):
    model = tiny(NAME)
    refused(tmp_path, ValueError, "teacher= is the model that is to be cut", model=model, teacher=model, **LEARN)


def test_a_teacher_of_the_same_head_in_another_family_teaches(tmp_path):
    teacher = tiny("RobertaForSequenceClassification")
    run = trainer(tmp_path, args={"max_steps": 1}, teacher=teacher, **LEARN)
    assert run.train().global_step == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [([0], "give one of the teacher's layers"), ([0, 2], r"layers 0\.\.1"), ([0, 1, 1], "student's 2")],
)
def test_layer_maps_that_do_not_fit(tmp_path, layers, message):
    refused(
        tmp_path, ValueError, message, teacher=tiny(NAME), distillation=DistillationConfig(layer_map=layers)
    )  # fmt: skip


# --- directories -----------------------------------------------------------------------------------------------------


def saved(name=NAME, **changes):
    return lambda home: tiny(name, **changes).save_pretrained(home)


def broken(home):
    tiny(NAME).save_pretrained(home)
    (home / "model.safetensors").write_bytes((home / "model.safetensors").read_bytes()[:999])


def bare(home):
    tiny(NAME).save_pretrained(home)
    (home / "config.json").unlink()


def empty(home):
    home.mkdir()


DIRECTORIES = {
    "nothing": (lambda home: None, "does not open as BertForSequenceClassification"),
    "empty": (empty, "does not open as"),
    "a file": (lambda home: home.write_text("weights"), "does not open as"),
    "no config": (bare, "does not open as"),
    "weights cut off": (broken, "does not open as"),
    "another head": (saved("BertForMaskedLM"), "is no BertForSequenceClassification: it has no weights for"),
}


@pytest.mark.parametrize("what", DIRECTORIES)
def test_teachers_by_name_that_do_not_open(tmp_path, what):
    make, message = DIRECTORIES[what]
    make(tmp_path / "teacher")
    given = {"distillation": DistillationConfig(teacher=str(tmp_path / "teacher"))}
    refused(tmp_path / "run", ValueError, f"DistillationConfig.teacher '.*teacher' {message}", **given)


@pytest.mark.parametrize("what", DIRECTORIES)
def test_early_weights_that_do_not_open(tmp_path, what):
    make, message = DIRECTORIES[what]
    make(tmp_path / "early")
    given = {"pruning": {"rewind_to": str(tmp_path / "early")}}
    refused(tmp_path / "run", ValueError, f"rewind_to '.*early' {message}", **given)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"intermediate_size": 40}, {"num_labels": 3}, {"vocab_size": 50}],
    ids=str,
)
def test_early_weights_of_another_model(tmp_path, changes):
    saved(**changes)(tmp_path / "early")
    given = {"pruning": {"rewind_to": str(tmp_path / "early")}}
    refused(tmp_path / "run", ValueError, "rewind_to=.* holds another model: .* there, .* here", **given)


def test_early_weights_that_vanish_are_missed_before_the_cut(tmp_path):
    saved()(tmp_path / "early")
    run = trainer(tmp_path / "run", pruning={"rewind_to": str(tmp_path / "early")})
    before = snapshot(run.model)["weights"]
    shutil.rmtree(tmp_path / "early")
    with pytest.raises(ValueError, match=r"rewind_to '.*early' does not open"):
        run.train()
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in before.items())


# --- data and steps --------------------------------------------------------------------------------------------------

DATA = {
    "none": ([], "0 calibration examples: at least 8"),
    "too few": (rows(tiny(NAME), 7), "7 calibration examples: at least 8"),
    "an empty Dataset": (rows(tiny(NAME)).select([]), "0 calibration examples: at least 8"),
    "a text": ("sst2", "^calibration_dataset cannot be read"),
    "a number": (3, "^calibration_dataset cannot be read"),
    "a batch": (rows(tiny(NAME)).with_format("torch")[:8], "^calibration_dataset cannot be read"),
    "texts": (["good"] * 9, "^calibration_dataset cannot be read"),
    "other columns": ([{"text": "good"}] * 9, "found nothing"),
    "no labels the model knows": (
        rows(tiny(NAME)).map(lambda row: {"labels": 7}), "labels hold 7; the model knows 0 to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DATA)
def test_calibration_data_that_cannot_be_used(tmp_path, what):
    data, message = DATA[what]
    refused(tmp_path, (ValueError, TypeError), message, calibration_dataset=data)


def test_training_data_that_cannot_be_used(tmp_path):
    refused(tmp_path, ValueError, "7 calibration examples: at least 8", train_dataset=rows(tiny(NAME), 7))


@pytest.mark.parametrize(
    ("pruning", "steps"),
    [
        ({"rounds": 3}, 2),
        ({"rounds": 17}, 16),
        ({"rounds": 2, "recovery": 0.99}, 8),
        ({"rounds": 2, "recovery": 0.01}, 8),
    ],
)
def test_rounds_that_do_not_fit(tmp_path, pruning, steps):
    message = f"rounds={pruning['rounds']} with recovery=.* do not fit into {steps} steps"
    refused(tmp_path, ValueError, message, pruning=pruning, args={"max_steps": steps})


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"keep": 0.01}, "keep=0.01 of the macs .*cannot be reached"),
        ({"units": ["heads"], "shapes": "stock"}, "cannot say another number of heads"),
        ({"units": ["neurons", "tokens"]}, r"no tokens here.*Shorten the vocabulary with prune\(\) first"),
        ({"repair": "bias"}, None),
    ],
)
def test_cuts_that_cannot_be_made(tmp_path, pruning, message):
    name = NAME if message else "LlamaForCausalLM"
    refused(tmp_path, ValueError, message or "repair='bias' needs a bias", class_name=name, pruning=pruning)


# --- the callback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pruning": {"keep": 0.5}}, "takes a PruningConfig, got dict"),
        ({"pruning": "magnitude"}, "takes a PruningConfig, got str"),
        (
            {"pruning": config(units=["neurons", "layers"])},
            "no layers here, since PruningCallback masks heads and neur",
        ),
        ({"pruning": None}, "takes a PruningConfig, got NoneType"),
        ({"begin": "0.1"}, "begin='0.1'"),
        ({"begin": None}, "begin=None"),
        ({"end": float("nan")}, "end=nan"),
        ({"end": 2}, "end=2"),
        ({"every": 2.5}, r"every=2\.5"),
        ({"every": "20"}, "every='20'"),
        ({"every": True}, "every=True"),
        ({"every": 0}, "every=0"),
    ],
)
def test_a_callback_s_settings(given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PruningCallback(**{"pruning": config(), **given})


@pytest.mark.parametrize("what", ["with adapters", "a plain module", "experts"])
def test_models_that_a_callback_cannot_cut(tmp_path, what):
    mixture = partial(tiny_model, "mixtral")
    model = {"with adapters": MODELS["with adapters"][0], "a plain module": Plain, "experts": mixture}[what]()
    data = rows(tiny(NAME))
    args = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none", remove_unused_columns=False)
    with pytest.raises(
        (ValueError, TypeError),
        match=r"wrapper|adapter|takes a transformers PreTrainedModel|has experts. PruningTrainer",
    ):
        Trainer(model=model, args=args, train_dataset=data, callbacks=[PruningCallback(config())]).train()


class Plain(torch.nn.Module):
    """Trains, but is no transformers model."""

    def __init__(self):
        super().__init__()
        self.inner = tiny(NAME)

    def forward(self, **inputs):
        return self.inner(**inputs)
