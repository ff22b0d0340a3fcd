"""The door of the configuration: every field with values of the wrong kind, other files and mappings, round trips."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from tiny import changed, cut_everywhere, snapshot, tiny, tiny_batch
from transformers import HfArgumentParser, TrainingArguments

from hf_prune import DistillationConfig, PruningConfig, describe, prune
from hf_prune.config import DISTILLATION_CHECKS, PRESETS, PRUNING_CHECKS

NAN, INF = math.nan, math.inf
NEVER = [[], {}, object(), b"x"]  # no field takes these
CHOICE = ["", "Macs", 1, True, ["macs"]]
WHOLE = [0, -1, 2.5, 2.0, 1e9, "2", True, NAN, INF, [2]]
WEIGHT = [-0.1, NAN, INF, "0.5", True, [1.0]]
BAD = {
    PruningConfig: {
        "keep": [None, 0, -0.5, 1.0001, NAN, INF, "0.5", True, [0.5], 10**400],
        "metric": [None, *CHOICE],
        "scope": [False, *CHOICE],
        "units": ["heads", "", [], [1], [None], ["expert"], ["heads", "Heads"], {"heads": 1}, 3],
        "criterion": ["None", *CHOICE],
        "layer_criterion": [None, *CHOICE],
        "min_count": [None, *WHOLE],
        "max_tokens": WHOLE,
        "candidates": [None, *WHOLE],
        "shapes": [None, *CHOICE],
        "allocation": [None, *CHOICE],
        "align": WHOLE,
        "repair": [None, *CHOICE],
        "batch_norm": [None, "yes", 1, 0.5],
        "calibration_samples": [None, 7, *WHOLE],
        "calibration_seed": [None, -1, 2**32, 0.5, "0", True, NAN],
        "sequence_length": [None, *WHOLE],
        "latency_batch_size": [None, *WHOLE],
        "rounds": [None, *WHOLE],
        "schedule": [None, *CHOICE],
        "recovery": [None, 0, 1, -1, NAN, INF, "0.5", True],
        "rewind_to": ["", 3, True, ["a"]],
    },
    DistillationConfig: {
        "teacher": ["", 3, True, ["a"]],
        "teacher_dtype": ["float64", 16, ["float16"]],
        "task_weight": [None, *WEIGHT],
        "logits_weight": [None, *WEIGHT],
        "temperature": [None, 0, *WEIGHT],
        "hidden_weight": [None, *WEIGHT],
        "attention_weight": [None, *WEIGHT],
        "layer_map": [3, "0,1", [], [-1], [0.5], ["0"], [True], {0: 1}],
    },
}
ROWS = [
    pytest.param(config, field, value, id=f"{field}-{value!r:.20}")
    for config, fields in BAD.items()
    for field, values in fields.items()
    for value in (*values, *NEVER)
]


@pytest.mark.parametrize(
    ("config", "checks"), [(PruningConfig, PRUNING_CHECKS), (DistillationConfig, DISTILLATION_CHECKS)]
)
def test_every_field_is_checked_and_tried(config, checks):
    names = {field.name for field in dataclasses.fields(config)}
    assert set(checks) == set(BAD[config]) == names


@pytest.mark.parametrize(("config", "field", "value"), ROWS)
def test_a_wrong_value_is_named_with_its_field_and_what_is_allowed(config, field, value):
    with pytest.raises(ValueError, match=rf"^{field}=.*(is not one of|must|at least)") as refused:
        config(**{field: value})
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"keep": np.float32(0.5)}, 0.5),
        ({"keep": 1}, 1),
        ({"rounds": np.int64(3)}, 3),
        ({"units": ("heads", "neurons")}, ["heads", "neurons"]),
        ({"scope": None, "metric": "params"}, "params"),
    ],
)
def test_numbers_of_numpy_and_tuples_become_plain(given, kept):
    config = PruningConfig(**given)
    name = list(given)[-1]
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept)


def test_the_scope_follows_the_metric():
    assert [PruningConfig(metric=metric).scope for metric in ("macs", "params", "latency")] == [
        "model",
        "blocks",
        "model",
    ]


def test_all_weights_at_zero_teach_nothing():
    with pytest.raises(ValueError, match="All distillation weights are 0"):
        DistillationConfig(logits_weight=0, hidden_weight=0)


# --- mappings and files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, 3, "keep", [("keep", 0.5)], PruningConfig()], ids=repr)
def test_only_a_mapping_makes_a_config(data):
    with pytest.raises(ValueError, match="made from a mapping of its fields"):
        PruningConfig.from_dict(data)


def test_keys_of_any_type_that_are_not_known_are_named():
    with pytest.warns(UserWarning, match=r"ignores unknown keys \['3', 'None', 'kept'\]"):
        assert PruningConfig.from_dict({3: 1, None: 2, "kept": 3, "keep": 0.7}) == PruningConfig(keep=0.7)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "found NoneType"),
        (b"- keep: 0.5", "found list"),
        (b"[]", "found list"),
        (b"0.5", "found float"),
        (b"keep", "found str"),
        (b"keep: [0.5", "is no YAML"),
        (b"keep: 2021-99-99", "is no YAML"),
        (b"keep: !!python/object:os.system {}", "is no YAML"),
        (b"[" * 5000, "is no YAML"),
        (b"\xff\xfe\x00\x81", "is no text"),
        (b"pruning: 0.5", "made from a mapping"),
        (b"pruning:", "made from a mapping"),
        (b"pruning: {keep: half}", "keep='half'"),
        (b"keep: '0.5'", "keep='0.5'"),
        (b"rounds: 2.5", "rounds=2.5"),
        (b"units: heads", "units='heads'"),
        (b"align: .nan", "align=nan"),
        (b"scope: no", "scope=False"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, problem):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        PruningConfig.from_yaml(path)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        PruningConfig.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(IsADirectoryError, match="is a directory; a file is needed"):
        PruningConfig.from_yaml(tmp_path)
    with pytest.raises(TypeError, match="named by a path, got int"):
        PruningConfig.from_yaml(3)


@pytest.mark.parametrize("config", [PruningConfig(), *(PruningConfig.preset(name) for name in PRESETS)])
def test_yaml_round_trip(tmp_path, config):
    (tmp_path / "a.yaml").write_text(config.to_yaml())
    assert PruningConfig.from_yaml(tmp_path / "a.yaml") == config
    assert PruningConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", ["nobody", "", None, 3, ["flap"], True])
def test_an_unknown_preset_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r"No preset .*Known: magnitude, michel2019"):
        PruningConfig.preset(name)


@pytest.mark.parametrize("given", [{}, {"keep": 0.9}, "flap", 3, True, PruningConfig, DistillationConfig()], ids=repr)
@pytest.mark.parametrize("replayed", [False, True])
def test_only_a_config_says_how_to_prune(given, replayed):
    model = tiny("BertForSequenceClassification")
    before, plan = snapshot(model), cut_everywhere(describe(model)) if replayed else None
    with pytest.raises(TypeError, match=r"config is a PruningConfig, got .*from_dict"):
        prune(model, [tiny_batch(model)], given, plan=plan)
    assert list(changed(before, model)) == []


# --- the command line ------------------------------------------------------------------------------------------------


def test_flags_of_both_configs_are_parsed(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--keep", "0.7", "--units", "heads", "neurons", "--rounds", "3"]
    flags += ["--layer_map", "0", "2", "--temperature", "3", "--rewind_to", "early"]
    parser = HfArgumentParser((TrainingArguments, PruningConfig, DistillationConfig))
    _, pruning, distillation = parser.parse_args_into_dataclasses(flags)
    assert pruning == PruningConfig(keep=0.7, units=["heads", "neurons"], rounds=3, rewind_to="early")
    assert distillation == DistillationConfig(layer_map=[0, 2], temperature=3.0)


@pytest.mark.parametrize("flags", [["--keep", "a"], ["--rounds", "2.5"], ["--shapes", "any"], ["--layer_map", "x"]])
def test_flags_of_another_type_are_a_usage_error(flags):
    with pytest.raises(SystemExit) as stop:
        HfArgumentParser((PruningConfig, DistillationConfig)).parse_args_into_dataclasses(flags)
    assert stop.value.code == 2
