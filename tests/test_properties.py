"""Edited plans, configs and batches thrown at their doors: an error of ours that changes nothing, or a right result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, configuration, given, settings
from hypothesis import strategies as st
from tiny import changed, cut_everywhere, outputs, snapshot, tiny, tiny_batch

import hf_prune
from hf_prune import DistillationConfig, PruningConfig, PruningPlan, describe, prune

configuration.set_hypothesis_home_dir(tempfile.mkdtemp())  # it keeps its tables there, not in the checkout
HOME = Path(hf_prune.__file__).parent
FEW = settings(
    derandomize=True, max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, derandomize=False, max_examples=3000, print_blob=True)
EXPECTED = ("PruningConfig ignores unknown keys", "calibration tokens to refit", "No labels: ")  # warnings of ours


def door(strategy: Any) -> Callable[[Any], Any]:
    """A check as a test of a few examples, always the same, and as a slow one of thousands that differ."""

    def tests(check: Any) -> Any:
        @pytest.mark.parametrize("size", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
        def test(size: Any) -> None:
            @size
            @given(strategy)
            def examples(value: Any) -> None:
                check(value)

            examples()

        return test

    return tests


@contextlib.contextmanager
def ours(model: Any = None) -> Iterator[list[Exception]]:
    """No error, or one that hf_prune raised itself, in a short sentence, and that left the model as it was."""
    before, errors = (snapshot(model) if model is not None else None), []
    with warnings.catch_warnings():
        for message in EXPECTED:
            warnings.filterwarnings("ignore", f".*{message}")
        try:
            yield errors
        except (ValueError, TypeError) as error:
            errors.append(error)
    for error in errors:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        assert raised_in.is_relative_to(HOME), f"{type(error).__name__} of {raised_in}: {error}"
        assert 20 < len(str(error)) < 1000
        assert model is None or not hasattr(model, "_hf_prune")
        assert model is None or list(changed(before, model)) == []


WORDS = (
    "",
    "head",
    "kv_group",
    "neuron",
    "heads",
    "encoder",
    "decoder",
    "attention",
    "ffn",
    "macs",
    "stock",
    "0",
    "None",
)
NUMBERS = st.one_of(st.integers(-3, 60), st.sampled_from((2**31, -(2**63), 10**30)), st.floats())
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS))
JUNK = st.one_of(LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.sampled_from(WORDS), LEAVES, max_size=2))


# --- plans -----------------------------------------------------------------------------------------------------------


def paths(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something lies in nested lists and mappings."""
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield (*here, step)
        yield from paths(inner, (*here, step))


def edit(data: Any, path: tuple[Any, ...], how: str, value: Any) -> None:
    """Set, remove or add at a path, where it is still there after earlier edits."""
    with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):
        for step in path[:-1]:
            data = data[step]
        if how == "remove":
            del data[path[-1]]
        elif how == "repeat":
            data.append(copy.deepcopy(data[path[-1]]))
        else:
            data[path[-1]] = value


LLAMA = tiny("LlamaForCausalLM")
PLAN = dataclasses.replace(
    cut_everywhere(describe(LLAMA)),
    config=PruningConfig(repair="none", sequence_length=16).to_dict(),
    cost={"keep": 0.5},
).to_dict()
EDIT = st.tuples(
    st.sampled_from(sorted(paths(PLAN), key=str)), st.sampled_from(("set", "set", "remove", "repeat")), JUNK
)


@door(st.lists(EDIT, min_size=1, max_size=3))
def test_edited_plans(edits: Any) -> None:
    data, model = copy.deepcopy(PLAN), copy.deepcopy(LLAMA)
    for path, how, value in edits:
        edit(data, path, how, value)
    with ours(model) as errors:
        plan = PruningPlan.from_dict(data)
        assert PruningPlan.from_json(plan.to_json()).hash == plan.hash
        prune(model, [tiny_batch(model)], plan=plan)
    if not errors:
        sizes = describe(model).sizes
        assert all(sizes[kept.where][kept.axis] == len(kept.kept) for kept in plan.kept)
        right(model)


def right(model: Any) -> None:
    """It computes, and its config builds what its weights fill."""
    assert all(bool(value.isfinite().all()) for value in outputs(model, tiny_batch(model)))
    type(model)(copy.deepcopy(model.config)).load_state_dict(model.state_dict())


# --- configs ---------------------------------------------------------------------------------------------------------


def changes(config: Any) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    return st.tuples(st.just(config), st.dictionaries(st.sampled_from(names), JUNK, min_size=1, max_size=3))


@door(st.one_of(changes(PruningConfig), changes(DistillationConfig)))
def test_edited_configs(given: Any) -> None:
    kind, fields = given
    with ours() as errors:
        config = kind(**fields)
    if not errors:
        plain = yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))
        assert kind(**plain) == config


@door(
    st.one_of(JUNK, st.dictionaries(st.one_of(LEAVES, st.sampled_from(("keep", "units", "scope"))), JUNK, max_size=4))
)
def test_mappings_that_are_no_config(data: Any) -> None:
    with ours() as errors:
        config = PruningConfig.from_dict(data)
    if not errors:
        assert PruningConfig.from_dict(config.to_dict()) == config


# --- batches ---------------------------------------------------------------------------------------------------------

MODELS = {
    name: tiny(name)
    for name in (
        "BertForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering", "LlamaForCausalLM",
        "T5ForConditionalGeneration",
    )
}  # fmt: skip
KEYS = ("input_ids", "attention_mask", "labels", "start_positions", "end_positions")
DTYPES = (torch.bool, torch.int8, torch.int32, torch.float16, torch.float32, torch.float64, torch.complex64)
VALUES = (0, 1, 2, -1, -100, 98, 99, 10**9)
NAN, INF = float("nan"), float("inf")
NAMES = st.sampled_from((*KEYS, "label", "position_ids", "token_type_ids", "other"))
TENSORS: dict[str, Any] = {
    "dtype": (st.sampled_from(DTYPES), lambda tensor, dtype: tensor.to(dtype)),
    "value": (st.sampled_from((*VALUES, NAN, INF)), lambda tensor, value: filled(tensor, value)),
    "one value": (
        st.sampled_from(VALUES),
        lambda tensor, value: tensor.clone().index_fill_(0, torch.tensor([0]), value),
    ),
    "rows": (st.integers(0, 9), lambda tensor, rows: tensor[:rows]),
    "columns": (st.integers(0, 13), lambda tensor, columns: tensor[..., :columns]),
    "form": (
        st.sampled_from(("flat", "one more", "first", "turned", "scalar", "twice as long")),
        lambda tensor, form: FORMS[form](tensor),
    ),
    "thing": (st.sampled_from((None, 3, "words", [1, 2], [[1]], {})), lambda tensor, thing: thing),
    "device": (st.just("meta"), lambda tensor, device: tensor.to(device)),
}  # fmt: skip
FORMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda tensor: tensor.flatten(),
    "one more": lambda tensor: tensor[..., None],
    "first": lambda tensor: tensor[None],
    "turned": lambda tensor: tensor.transpose(0, -1),
    "scalar": lambda tensor: tensor.flatten()[0],
    "twice as long": lambda tensor: torch.cat([tensor] * 2, -1),
}
CHANGES = st.sampled_from(sorted(TENSORS)).flatmap(lambda how: st.tuples(st.just(how), TENSORS[how][0]))
BATCH_EDIT = st.tuples(
    st.sampled_from(KEYS),
    st.one_of(
        CHANGES,
        st.tuples(st.sampled_from(("drop", "rename", "copy")), NAMES),
    ),
)  # fmt: skip


def filled(tensor: torch.Tensor, value: float) -> torch.Tensor:
    return torch.full(tensor.shape, value, dtype=torch.float32 if value in (NAN, INF) else tensor.dtype)


def edited(batch: dict[str, Any], key: str, how: str, value: Any) -> None:
    if how in TENSORS and isinstance(batch.get(key), torch.Tensor):
        with contextlib.suppress(RuntimeError, IndexError):  # torch cannot make it
            batch[key] = TENSORS[how][1](batch[key], value)
    elif how == "drop":
        batch.pop(key, None)
    elif how in ("rename", "copy") and key in batch:
        batch[value] = batch[key]
        if how == "rename" and value != key:
            del batch[key]


@door(st.tuples(st.sampled_from(sorted(MODELS)), st.lists(BATCH_EDIT, min_size=1, max_size=2)))
def test_edited_batches(given: Any) -> None:
    name, edits = given
    model = copy.deepcopy(MODELS[name])
    batch = tiny_batch(model)
    for key, (how, value) in edits:
        edited(batch, key, how, value)
    held = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with ours(model) as errors:
        prune(model, [batch], PruningConfig(keep=0.9, metric="params", shapes="uniform", align=1))
    for key, value in held.items():
        same = value is batch[key] if not isinstance(value, torch.Tensor) else value.shape == batch[key].shape
        assert same, f"{key} was modified"
    if not errors:
        right(model)
