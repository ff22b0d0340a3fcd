"""Rules of the house that matter, as tests."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from transformers import HfArgumentParser, TrainingArguments

import hf_prune
from hf_prune import DistillationConfig, PruningConfig
from hf_prune.config import PRESETS, UNIT_CHOICES, Allocation, Criterion, Metric, Repair, Schedule, Scope, Shapes
from hf_prune.families import FAMILIES
from hf_prune.importance import CRITERIA
from hf_prune.schedules import SCHEDULES

PACKAGE = Path(hf_prune.__file__).parent
ORDER = (
    "files", "families", "plan", "schedules", "config", "sites", "anatomy", "importance", "costs", "allocate",
    "layerwise", "batches", "losses", "calibrate", "surgery", "undo", "latency", "checkpoint", "repair", "sequential",
    "oneshot", "data", "report", "export", "callbacks", "distill", "teaching", "rounds", "saving", "trainer",
)  # fmt: skip
PACKAGES = ("checkpoint", "report", "export")  # of several files
TOGETHER = ("report", "export")  # which may import each other


def imports(path):
    """(name, level) of every import anywhere in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.level) for alias in node.names)


def own(path):
    """The modules of hf_prune that a file imports."""
    for name, level in imports(path):
        if level or name.split(".")[0] == "hf_prune":
            yield name.removeprefix("hf_prune.").split(".")[0]


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_upward(module):
    files = sorted((PACKAGE / module).glob("*.py")) if module in PACKAGES else [PACKAGE / f"{module}.py"]
    allowed = {*ORDER[: ORDER.index(module)], *(TOGETHER if module in TOGETHER else ())}
    inside = {path.stem for path in files} if module in PACKAGES else set()
    assert [name for path in files for name in own(path) if name not in allowed | inside] == []


def test_every_module_has_its_place():
    outer = {"__init__", "cli", "hub", "recipe"}  # may import from all
    assert {path.stem for path in PACKAGE.glob("*.py")} - outer == set(ORDER) - set(PACKAGES)


@pytest.mark.parametrize(
    ("module", "more"),
    [("files", set()), ("families", set()), ("plan", set()), ("schedules", set()), ("config", {"yaml"})],
)
def test_the_first_modules_need_no_torch(module, more):
    for name, level in imports(PACKAGE / f"{module}.py"):
        assert level or name.split(".")[0] in sys.stdlib_module_names | more, name


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_import_loads_no_modelling_file():
    code = "import sys, hf_prune; print([m for m in sys.modules if '.modeling_' in m and 'transformers.models.' in m])"
    loaded = ast.literal_eval(run(code))
    assert [name for name in loaded if not name.startswith("transformers.models.auto.")] == []


def test_public_names_exist_and_are_documented():
    assert list(hf_prune.__all__) == sorted(hf_prune.__all__)
    for name in hf_prune.__all__:
        assert getattr(hf_prune, name).__doc__, name
    assert dir(hf_prune) == list(hf_prune.__all__)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'prun'.*prune"):
        hf_prune.prun  # noqa: B018


def test_no_print_in_the_library():
    talkers = {"cli.py", "commands", "demo"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in talkers:
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_every_family_has_a_tiny_config():
    from tiny import CLASSES, CONFIGS

    assert set(FAMILIES) == set(CONFIGS) == set(CLASSES)


# --- the configuration -----------------------------------------------------------------------------------------------

FLAGS = {
    "keep": 0.4, "metric": "params", "scope": "model", "units": ["heads", "neurons"], "criterion": "hessian",
    "shapes": "per_layer", "align": 16, "repair": "bias", "calibration_samples": 64, "calibration_seed": 3,
    "sequence_length": 77, "latency_batch_size": 4, "allocation": "ratio",
    "rounds": 3, "schedule": "linear", "recovery": 0.25, "rewind_to": "early",
}  # fmt: skip


def test_every_flag_beside_training_arguments(tmp_path):
    assert set(FLAGS) == set(PruningConfig().to_dict())
    line = ["--output_dir", str(tmp_path), "--seed", "5"]
    for name, value in FLAGS.items():
        line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    training, pruning = HfArgumentParser((TrainingArguments, PruningConfig)).parse_args_into_dataclasses(line)
    assert training.seed == 5
    assert pruning == PruningConfig(**FLAGS)


def test_defaults_beside_training_arguments(tmp_path):
    parser = HfArgumentParser((TrainingArguments, PruningConfig, DistillationConfig))
    line = ["--output_dir", str(tmp_path), "--temperature", "3", "--layer_map", "1", "3"]
    _, pruning, distillation = parser.parse_args_into_dataclasses(line)
    assert pruning == PruningConfig()
    assert distillation == DistillationConfig(temperature=3.0, layer_map=[1, 3])


@pytest.mark.parametrize("config", [PruningConfig, DistillationConfig])
def test_every_field_has_a_help_text(config):
    for name, field in config.__dataclass_fields__.items():
        assert field.metadata["help"], name


def test_scope_follows_the_metric():
    assert (
        PruningConfig().scope == PruningConfig(metric="macs").scope == PruningConfig(metric="latency").scope == "model"
    )
    assert PruningConfig(metric="params").scope == "blocks"
    assert PruningConfig(metric="params", scope="model").scope == "model"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    config = PruningConfig.preset(name, keep=0.3)
    assert config.keep == 0.3
    assert {key: getattr(config, key) for key in PRESETS[name]} == PRESETS[name]


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"No preset 'snip'\. Known: magnitude"):
        PruningConfig.preset("snip")


def test_yaml_round_trip(tmp_path):
    config = PruningConfig(**FLAGS)
    path = tmp_path / "recipe.yaml"
    path.write_text(config.to_yaml())
    assert PruningConfig.from_yaml(path) == config
    path.write_text(yaml.safe_dump(config.to_dict()))  # a file of bare fields
    assert PruningConfig.from_yaml(path) == config


def test_unknown_keys_warn(tmp_path):
    with pytest.warns(UserWarning, match=r"ignores unknown keys \['blocks'\]"):
        assert PruningConfig.from_dict({"keep": 0.4, "blocks": 3}) == PruningConfig(keep=0.4)


def test_a_recipe_is_a_mapping(tmp_path):
    (tmp_path / "r.yaml").write_text("- keep")
    with pytest.raises(ValueError, match="a recipe is a mapping"):
        PruningConfig.from_yaml(tmp_path / "r.yaml")


def test_choices_are_what_the_code_knows():
    assert set(get_args(Criterion)) == set(CRITERIA)
    assert set(get_args(Metric)) == {"macs", "params", "latency"}
    assert set(get_args(Scope)) == {"model", "blocks"}
    assert set(get_args(Allocation)) == {"loss", "ratio"}
    assert set(get_args(Shapes)) == {"stock", "uniform", "per_layer"}
    assert set(get_args(Schedule)) == set(SCHEDULES)
    assert set(get_args(Repair)) == {"least_squares", "rescale", "bias", "none"}
    assert UNIT_CHOICES == ("heads", "kv_groups", "neurons")
