"""PruningTrainer: rounds, resumed runs, several processes, adapters, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import training
from peft import LoraConfig, PeftModel
from tiny import outputs, tiny, tiny_batch
from training import arguments, config, rows, trainer
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from hf_prune import (
    DistillationConfig,
    PruningCallback,
    PruningMixin,
    PruningSeq2SeqTrainer,
    PruningTrainer,
    describe,
    prune,
)
from hf_prune.decide.costs import report
from hf_prune.train.resume import complete_checkpoints
from hf_prune.train.rounds import STATE_FILE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tokens to refit"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # peft and trl
]

LORA = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
STEPS = {"save_strategy": "steps", "save_steps": 3}


def cost(model, length=12):
    anatomy = describe(model)
    return report(anatomy, anatomy.sizes, length)["macs_model"]


class Watcher(TrainerCallback):
    """Counts what callbacks hear of."""

    def __init__(self):
        self.heard = []
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("begin")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append("end")

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


# --- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_run_whatever_the_rounds(tmp_path, rounds):
    watcher = Watcher()
    run = trainer(tmp_path, pruning={"rounds": rounds}, callbacks=[watcher])
    before = cost(run.model)
    output = run.train()
    assert watcher.heard == ["begin", "end"]
    assert watcher.steps == list(range(1, 17))
    assert output.global_step == 16
    assert len(run.results) == rounds
    assert cost(run.model) <= 0.6 * before
    kept = [entry["keep"] for entry in run.state.log_history if "keep" in entry]
    assert kept == sorted(kept, reverse=True)
    assert len(kept) == rounds
    assert [entry["step"] for entry in run.state.log_history if "train_loss" in entry] == [16]


def test_the_loss_of_a_run_is_that_of_its_steps(tmp_path):
    """The mean over all rounds, weighed by their steps."""
    run = trainer(tmp_path, args={"logging_steps": 1}, pruning={"rounds": 2})
    output = run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 16
    assert output.training_loss == pytest.approx(sum(losses) / 16, rel=1e-5)


def test_layers_go_in_rounds_too(tmp_path):
    """What stays of them trains, and a resumed run ends with the same weights."""
    given = {"pruning": {"rounds": 2, "keep": 0.5, "units": ["neurons", "layers"], "shapes": "stock"}}
    model = partial(tiny, "BertForSequenceClassification", num_hidden_layers=4)
    run = trainer(tmp_path, model=model(), args={**STEPS, "max_steps": 4, "save_steps": 1}, **given)
    before = cost(run.model)
    run.train()
    assert run.model.config.num_hidden_layers < 4
    assert 0.4 * before < cost(run.model) <= 0.5 * before
    assert [name for name, weight in run.model.named_parameters() if not weight.requires_grad] == []
    again = trainer(tmp_path, model=model(), args={**STEPS, "max_steps": 4, "save_steps": 1}, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    weights = run.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_every_weight_learns_in_every_round(tmp_path):
    """A stale optimizer would train nothing after a cut."""
    seen = []

    class Keep(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step in (8, 12):
                seen.append([p.detach().clone() for p in model.parameters()])

    run = trainer(tmp_path, args={"weight_decay": 0.0}, pruning={"rounds": 2}, callbacks=[Keep()])
    run.train()
    changed = [not torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert sum(changed) == len(changed)


def test_the_learning_rate_is_rewound(tmp_path):
    run = trainer(tmp_path, args={"logging_steps": 1, "warmup_steps": 0}, pruning={"rounds": 2})
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates[:8] == pytest.approx(rates[8:])
    assert rates[0] == pytest.approx(1e-3)


def test_without_pruning_it_is_the_stock_trainer(tmp_path):
    def train(cls):
        run = trainer(tmp_path, cls=cls, pruning=None) if cls is PruningTrainer else None
        if run is None:
            set_seed(0)
            model = tiny("BertForSequenceClassification")
            run = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(model))
        return run.train().training_loss, run.model.state_dict()

    (ours, weights), (theirs, stock) = train(PruningTrainer), train(Trainer)
    assert ours == theirs
    assert all(torch.equal(weights[name], stock[name]) for name in stock)


@pytest.mark.parametrize(
    "class_name",
    ["LlamaForCausalLM", "T5ForConditionalGeneration", "BertForQuestionAnswering", "ViTForImageClassification"],
)
def test_tasks(tmp_path, class_name):
    seq2seq = class_name.startswith("T5")
    cls = PruningSeq2SeqTrainer if seq2seq else PruningTrainer
    args = arguments(tmp_path, max_steps=4)
    args = Seq2SeqTrainingArguments(**args.to_dict()) if seq2seq else args
    run = trainer(tmp_path, class_name, cls, args=args, distillation=DistillationConfig(attention_weight=1.0))
    before = cost(run.model)
    run.train()
    assert cost(run.model) <= 0.6 * before
    run.save_model(str(tmp_path / "small"))
    batch = tiny_batch(run.model)
    again = type(run.model).from_pretrained(tmp_path / "small")
    for a, b in zip(outputs(run.model.eval(), batch), outputs(again.eval(), batch), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"auto_find_batch_size": True},
    ],
    ids=lambda args: next(iter(args)),
)
def test_stock_arguments(tmp_path, args):
    run = trainer(tmp_path, args=args, pruning={"rounds": 2}, distillation=DistillationConfig())
    assert run.train().global_step == (8 if "gradient_accumulation_steps" in args else 16)
    run.save_model(str(tmp_path / "small"))


def test_the_teacher_computes_in_the_precision_of_the_student(tmp_path):
    teacher, seen = tiny("BertForSequenceClassification"), set()
    teacher.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    trainer(tmp_path, args={"bf16": True}, distillation=DistillationConfig(), teacher=teacher).train()
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_out_of_memory_means_smaller_batches_and_one_cut(tmp_path, strategy):
    class Full(TrainerCallback):
        times = 0

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and not self.times:
                self.times += 1
                raise RuntimeError("CUDA out of memory.")

    args = {"auto_find_batch_size": True, "save_strategy": strategy}
    run = trainer(tmp_path, args=args, callbacks=[Full()])
    before = cost(run.model)
    assert run.train().global_step == 22  # batches of 3, not of 4
    assert len(run.results) == 1
    assert 0.5 * before < cost(run.model) <= 0.6 * before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_compiled(tmp_path):
    """torch.compile: each round compiles the model as it is then."""
    run = trainer(tmp_path, args={"torch_compile": True, "max_steps": 4}, pruning={"rounds": 2})
    before = cost(run.model)
    run.train()
    assert cost(run.model) <= 0.6 * before
    run.save_model(str(tmp_path / "small"))


def test_hyperparameter_search(tmp_path):
    """Every trial cuts a model of its own."""
    args = arguments(tmp_path, max_steps=2)
    data = rows(tiny("BertForSequenceClassification"))
    run = PruningTrainer(
        model_init=lambda: tiny("BertForSequenceClassification"), args=args, train_dataset=data, eval_dataset=data,
        pruning=config(), distillation=DistillationConfig(),
    )  # fmt: skip
    before, costs = cost(run.model), []
    run.add_callback(
        type("Cost", (TrainerCallback,), {"on_train_end": lambda *_, model, **__: costs.append(cost(model))})
    )
    run.evaluate()  # before any training, too
    best = run.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        backend="optuna", n_trials=2,
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert run.objective == losses[-1]
    assert best.objective <= run.objective
    assert len(costs) == 2
    assert all(found <= 0.6 * before for found in costs)


def test_hyperparameter_search_takes_the_metrics_as_the_stock_trainer_does(tmp_path):
    data = rows(tiny("BertForSequenceClassification"))
    run = PruningTrainer(
        model_init=lambda: tiny("BertForSequenceClassification"), args=arguments(tmp_path, max_steps=1),
        train_dataset=data, eval_dataset=data, pruning=config(), compute_metrics=lambda found: {"a": 2.0, "b": 0.5},
    )  # fmt: skip
    best = run.hyperparameter_search(hp_space=lambda trial: {}, backend="optuna", n_trials=1)
    assert best.objective == 2.5


def test_a_model_spread_by_a_device_map(tmp_path):
    """As device_map="auto" leaves it: accelerate's hooks on every module, here all on one device."""
    from accelerate import dispatch_model

    model = tiny("BertForSequenceClassification")
    places = {"bert.embeddings": "cpu", "bert.encoder": "cpu", "bert.pooler": "cpu", "classifier": "cpu"}
    model = dispatch_model(model, places, force_hooks=True)
    before = cost(model)
    run = trainer(tmp_path / "run", model=model)
    run.train()
    assert cost(run.model) <= 0.6 * before
    assert model.hf_device_map == places


# --- the best model, early stopping ----------------------------------------------------------------------------------


def test_the_best_model_is_of_the_last_round(tmp_path):
    args = {**STEPS, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    name = "ViTForImageClassification"
    run = trainer(tmp_path, name, args=args, pruning={"rounds": 2}, eval_dataset=rows(tiny(name)))
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert int(best.name.split("-")[1]) > 8
    again = type(run.model).from_pretrained(best)
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())


def test_early_stopping_ends_the_last_round_only(tmp_path):
    args = {
        **STEPS, "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.0,
    }  # fmt: skip
    given = {"callbacks": [EarlyStoppingCallback(1)], "eval_dataset": rows(tiny("BertForSequenceClassification"))}
    run = trainer(tmp_path, args=args, pruning={"rounds": 2}, **given)
    output = run.train()
    assert len(run.results) == 2
    assert output.global_step == 12  # best at 9, no better at 12


def test_a_callback_may_stop_it_in_any_round(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 3

    watcher = Watcher()
    run = trainer(tmp_path, pruning={"rounds": 3, "keep": 0.5}, callbacks=[Stop(), watcher])
    before = cost(run.model)
    with pytest.warns(UserWarning, match="stopped in round 1 of 3, at step 3 of 16: 0") as said:
        assert run.train().global_step == 3
    assert len(run.results) == 1
    assert watcher.heard == ["begin", "end"]
    remains = cost(run.model) / before
    assert remains > 0.5
    assert f"{remains:.3g} of the macs remains, where keep=0.5 was asked for" in str(said[0].message)
    assert f"PruningConfig(keep={0.5 / remains:.3g})" in str(said[0].message)


def dead_heads():
    """All but the first head add nothing."""
    model = tiny("BertForSequenceClassification")
    for layer in model.bert.encoder.layer:
        layer.attention.output.dense.weight.data[:, 8:] = 0
    return model


@pytest.mark.parametrize(("keep", "says"), [(0.7, True), (0.6, False)])
def test_a_plan_far_below_what_was_asked_says_so(tmp_path, keep, says):
    """Three of four heads are dead: without them 0.543 remains, at no loss, and the neurons between would lose some."""
    run = trainer(tmp_path, model=dead_heads(), args={"max_steps": 2}, pruning={"rounds": 2, "keep": keep})
    with (
        pytest.warns(UserWarning, match=rf"^0\.543 of the macs \(model\) remains, where keep={keep}")
        if says
        else (contextlib.nullcontext()) as said
    ):
        run.train()
    assert not says or len(said) == 1  # once, though two rounds were to come
    model = dead_heads()
    with pytest.warns(UserWarning, match="0.543 of the macs") if says else contextlib.nullcontext():
        prune(model, [tiny_batch(model)], config(keep=keep))
    assert 0.54 < [entry["keep"] for entry in run.state.log_history if "keep" in entry][-1] < 0.55


# --- saving ----------------------------------------------------------------------------------------------------------


def test_a_save_into_the_output_directory_keeps_the_checkpoints(tmp_path):
    run = trainer(tmp_path, args=STEPS)
    run.train()
    before = {path.name for path in complete_checkpoints(tmp_path)}
    run.save_model()
    assert {path.name for path in complete_checkpoints(tmp_path)} == before != set()
    batch = tiny_batch(run.model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.allclose(outputs(run.model.eval(), batch)[0], outputs(again, batch)[0], atol=1e-6)
    assert (tmp_path / "pruning_plan.json").exists()
    assert not (tmp_path / STATE_FILE).exists()  # of checkpoints alone


def test_a_save_that_does_not_reload_is_not_left(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    run.train()
    monkeypatch.setattr("hf_prune.train.saver.prove", lambda *_: (_ for _ in ()).throw(RuntimeError("other outputs")))
    with pytest.raises(RuntimeError, match="other outputs"):
        run.save_model(str(tmp_path / "small"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- resuming --------------------------------------------------------------------------------------------------------


def alone(directory, *arguments, launcher=(sys.executable,), fails=False):
    """The script in a process of its own, as a user runs it."""
    command = [*launcher, str(Path(training.__file__)), str(directory), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stderr[-2000:]
    return done.stderr


def assert_same_weights(one, other):
    """Bit by bit."""
    ours, theirs = (torch.load(home / "weights.pt") for home in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


def test_killed_and_resumed_it_ends_the_same(tmp_path):
    found = []
    for name, delays in (("whole", ()), ("killed", (0.9, 1.6))):
        (tmp_path / name).mkdir()
        alone(tmp_path / name, "kill", *delays)
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    whole, killed = found
    assert killed["plan"] == whole["plan"]
    assert killed["steps"] == whole["steps"]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.slow
def test_killed_at_many_points(tmp_path):
    """Forty attempts, each killed after another time: during scoring, in a cut, in a step, in a save."""
    found = []
    delays = [0.3 + 0.1 * (17 * i % 23) for i in range(40)]
    for name, times in (("whole", ()), ("killed", delays)):
        (tmp_path / name).mkdir()
        alone(tmp_path / name, "kill", *times)
        found.append(json.loads((tmp_path / name / "result.json").read_text()))
    assert found[0]["plan"] == found[1]["plan"]
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 3, 8])
def test_resume_from_any_checkpoint(tmp_path, step):
    """After a cut, within a round, and between two rounds."""
    whole = trainer(tmp_path, args={**STEPS, "save_steps": 1}, pruning={"rounds": 2})
    whole.train()
    resumed = trainer(tmp_path, args={**STEPS, "save_steps": 1}, pruning={"rounds": 2})
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert resumed.model._hf_prune.plan.hash == whole.model._hf_prune.plan.hash
    weights = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.allclose(value, weights[name], atol=1e-6), name


def test_half_written_checkpoints_are_passed_over(tmp_path):
    run = trainer(tmp_path, args=STEPS)
    run.train()
    (tmp_path / "checkpoint-99").mkdir()  # nothing in it
    (tmp_path / "checkpoint-98").mkdir()
    (tmp_path / "checkpoint-98" / STATE_FILE).write_text("{}")
    (tmp_path / "checkpoint-98" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-5.tmp").mkdir()
    assert complete_checkpoints(tmp_path)[-1].name == "checkpoint-16"
    again = trainer(tmp_path, args=STEPS)
    said = r"passed over: checkpoint-98 \(.*format None.*\); checkpoint-99 \(pruning_state.json is missing\)"
    with pytest.warns(UserWarning, match=said):
        assert again.train(resume_from_checkpoint=True).global_step == 16


def test_nothing_to_resume_from_starts_anew(tmp_path):
    with pytest.warns(UserWarning, match="No complete checkpoint .* starts anew"):
        assert trainer(tmp_path).train(resume_from_checkpoint=True).global_step == 16


def test_train_again_says_that_it_cuts_again(tmp_path):
    run = trainer(tmp_path, args={"max_steps": 2})
    run.train()
    run.pruning.keep = 1.0
    with pytest.warns(UserWarning, match="again cuts the model, which it has cut, to 1.0"):
        run.train()


def test_resume_with_another_config(tmp_path):
    trainer(tmp_path, args=STEPS).train()
    run = trainer(tmp_path, args=STEPS, pruning={"keep": 0.7})
    with pytest.raises(ValueError, match=r"another PruningConfig; \(there, here\): \{'keep': \(0.6, 0.7\)\}"):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint of a run with pruning"):
        run.train(resume_from_checkpoint=str(tmp_path))


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_do_as_one(tmp_path):
    """The same global batch: the same plans, the same loss."""
    for name, size, launcher in (("one", 8, (sys.executable,)), ("two", 4, TORCHRUN)):
        (tmp_path / name).mkdir()
        alone(tmp_path / name, size, launcher=launcher)
    one = json.loads((tmp_path / "one" / "result-0.json").read_text())
    for rank in (0, 1):
        two = json.loads((tmp_path / "two" / f"result-{rank}.json").read_text())
        assert (one["world"], two["world"]) == (1, 2)
        assert two["plans"] == one["plans"]
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [True, False])
def test_adapters(tmp_path, merge):
    given = {"peft_config": LoraConfig(**LORA), "merge_adapters": merge}
    run = trainer(tmp_path / "run", args=STEPS, pruning={"rounds": 2}, **given)
    run.train()
    assert isinstance(run.model, PeftModel) != merge
    run.save_model(str(tmp_path / "small"))
    batch = tiny_batch(tiny("BertForSequenceClassification"))
    if merge:
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    else:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small" / "base_model")
        again = PeftModel.from_pretrained(base, str(tmp_path / "small"))
    assert torch.allclose(outputs(run.model.eval(), batch)[0], outputs(again.eval(), batch)[0], atol=1e-5)
    resumed = trainer(tmp_path / "run", args=STEPS, pruning={"rounds": 2}, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    assert torch.allclose(outputs(run.model.eval(), batch)[0], outputs(resumed.model.eval(), batch)[0], atol=1e-5)


def test_adapters_train_and_the_rest_does_not(tmp_path):
    run = trainer(tmp_path, peft_config=LoraConfig(**LORA), merge_adapters=False)
    run.train()
    moved = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert moved
    assert all("lora_" in name or "modules_to_save" in name for name in moved)
    assert any("modules_to_save" in name for name in moved)  # the classifier


def test_trl(tmp_path):
    import trl
    from datasets import Dataset
    from tiny_text import sentences, tokenizer

    class PruningSFTTrainer(PruningMixin, trl.SFTTrainer):
        pass

    args = trl.SFTConfig(
        str(tmp_path), per_device_train_batch_size=8, max_steps=4, use_cpu=True, report_to="none", max_length=32,
        save_strategy="no", disable_tqdm=True, bf16=False, learning_rate=1e-3,
    )  # fmt: skip
    data = Dataset.from_dict({"text": sentences(32)})
    for more in (
        {"peft_config": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])},
        {"distillation": DistillationConfig()},
    ):
        model = tiny("LlamaForCausalLM")
        before = cost(model)
        run = PruningSFTTrainer(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), pruning=config(), **more
        )
        assert isinstance(run.model, PeftModel) == ("peft_config" in more)
        run.train()
        assert type(run.model).__name__ == "LlamaForCausalLM"
        assert cost(run.model) <= 0.6 * before


# --- rewinding -------------------------------------------------------------------------------------------------------


def test_kept_units_are_rewound(tmp_path):
    early = tiny("BertForSequenceClassification", seed=1)
    early.save_pretrained(tmp_path / "early")
    run = trainer(
        tmp_path / "run", args={"max_steps": 2, "learning_rate": 0.0}, pruning={"rewind_to": str(tmp_path / "early")}
    )
    run.train()
    plan = run.results[0].plan
    kept = plan["encoder", 0, "ffn"].kept
    down = early.bert.encoder.layer[0].output.dense
    found = run.model.bert.encoder.layer[0].output.dense
    assert torch.equal(found.weight, down.weight[:, list(kept)])
    assert torch.equal(run.model.classifier.weight, early.classifier.weight)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_rounds_that_do_not_fit(tmp_path):
    run = trainer(tmp_path, args={"max_steps": 2}, pruning={"rounds": 3})
    with pytest.raises(ValueError, match=r"rounds=3 .* do not fit into 2 steps"):
        run.train()
    assert run.results == []


def test_a_model_with_adapters(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny("BertForSequenceClassification"), LoraConfig(**LORA))
    with pytest.raises(ValueError, match="has adapters, which cannot be cut"):
        trainer(tmp_path, model=model)


def test_an_optimizer_of_the_dense_weights(tmp_path):
    model = tiny("BertForSequenceClassification")
    with pytest.raises(ValueError, match="holds the weights as they are before the cut"):
        trainer(tmp_path, model=model, optimizers=(torch.optim.SGD(model.parameters()), None))


def test_sharded_training_is_refused_where_it_is_launched(tmp_path):
    said = alone(tmp_path, "fsdp", launcher=TORCHRUN, fails=True)
    assert "ValueError: A model that FSDP shards cannot be cut" in said
    assert not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("name", "changes"), [("FSDP", {"is_fsdp_enabled": True}), ("DeepSpeed", {"is_deepspeed_enabled": True})]
)
def test_sharded_training_by_an_accelerate_config_is_refused(tmp_path, name, changes):
    run = trainer(tmp_path)
    vars(run).update(changes)
    with pytest.raises(ValueError, match=f"{name} shards cannot be cut"):
        run._check()


def test_teachers_that_do_not_fit(tmp_path):
    other = tiny("BertForSequenceClassification", num_labels=5)
    with pytest.raises(ValueError, match="another label space: 5 entries, the student has 2"):
        trainer(tmp_path, teacher=other, distillation=DistillationConfig())
    other = tiny("LlamaForCausalLM", vocab_size=120)
    with pytest.raises(ValueError, match="another vocabulary: 120 entries, the student has 99"):
        trainer(tmp_path, "LlamaForCausalLM", teacher=other, distillation=DistillationConfig())
    other = tiny("BertForSequenceClassification", hidden_size=64)
    with pytest.raises(ValueError, match="hidden states are 64 wide, the student's 32"):
        trainer(tmp_path, teacher=other, distillation=DistillationConfig())
    other = tiny("BertForSequenceClassification", id2label={0: "bad", 1: "good"})
    student = tiny("BertForSequenceClassification", id2label={0: "good", 1: "bad"})
    with pytest.raises(ValueError, match="same labels in the same order"):
        trainer(tmp_path, model=student, teacher=other, distillation=DistillationConfig())
    with pytest.raises(ValueError, match="teacher= without distillation="):
        trainer(tmp_path, teacher=other)


# --- the callback ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "OPTForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("shapes", ["uniform", "per_layer"])
def test_callback(tmp_path, class_name, shapes):
    """In a stock Trainer: smaller at the end, and the same function as with the last masks."""
    set_seed(0)
    model = tiny(class_name)
    before, seen = cost(model), []
    batch = tiny_batch(model)

    class Look(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            seen.append(outputs(model.eval(), batch)[0])

    callback = PruningCallback(config(shapes=shapes), every=2)
    Trainer(
        model=model, args=arguments(tmp_path), train_dataset=rows(model), callbacks=[Look(), callback]
    ).train()  # fmt: skip
    assert cost(model) <= 0.6 * before
    assert torch.allclose(outputs(model.eval(), batch)[0], seen[0], atol=1e-5)
    assert callback.result.report["keep"] <= 0.6
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.save_pretrained(tmp_path / "small")
    again = type(model).from_pretrained(tmp_path / "small")
    assert torch.allclose(outputs(model, batch)[0], outputs(again, batch)[0], atol=1e-6)


def test_callback_scores_are_the_fisher_scores(tmp_path):
    """With a learning rate of 0 and one update, its scores are those of prune() on the same rows."""
    from hf_prune import analyze

    set_seed(0)
    model = tiny("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data = rows(model)
    batches = [{k: torch.tensor(v) for k, v in data[:].items()}]
    callback = PruningCallback(config(), begin=0.0, end=1.0, every=1000)
    args = arguments(tmp_path, learning_rate=0.0, num_train_epochs=1)
    Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()
    wanted = analyze(tiny("BertForSequenceClassification"), batches, config(criterion="fisher")).scores
    for key, score in callback.result.scores.items():
        assert torch.allclose(score, 0.1 * wanted[key], rtol=1e-3, atol=1e-8), key


def test_callback_says_when_it_could_not_finish(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 6

    model = tiny("BertForSequenceClassification")
    callbacks = [PruningCallback(config(schedule="linear"), every=2), Stop()]
    run = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(model), callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"ended before the schedule: 0\.\d+ remains, of keep=0\.6 asked"):
        run.train()


def test_callback_refusals(tmp_path):
    with pytest.raises(ValueError, match="criterion='hessian'"):
        PruningCallback(config(criterion="hessian"))
    with pytest.raises(ValueError, match=r"metric='latency'"):
        PruningCallback(config(metric="latency"))
    with pytest.raises(ValueError, match=r"begin=0\.9, end=0\.2"):
        PruningCallback(config(), begin=0.9, end=0.2)
    model = tiny("BertForSequenceClassification")
    args = arguments(tmp_path, max_steps=1)
    run = Trainer(model=model, args=args, train_dataset=rows(model), callbacks=[PruningCallback(config(), 0.1, 0.4)])
    with pytest.raises(ValueError, match=r"never reach keep=0\.6"):
        run.train()


def test_a_checkpoint_without_its_state_is_incomplete(tmp_path):
    assert complete_checkpoints(tmp_path) == []
    (tmp_path / "checkpoint-4").mkdir()
    TrainerState().save_to_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    assert complete_checkpoints(tmp_path) == []
