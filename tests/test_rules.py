"""Rules of the house that matter, as tests."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import HfArgumentParser, TrainingArguments

import hf_prune
from hf_prune import DistillationConfig, PruningConfig
from hf_prune.config import PRESETS, UNIT_CHOICES, Allocation, Criterion, Metric, Repair, Schedule, Scope, Shapes
from hf_prune.model.families import FAMILIES, FFN, Attention, Family, Stack
from hf_prune.score.criteria import CRITERIA
from hf_prune.schedules import SCHEDULES

PACKAGE = Path(hf_prune.__file__).parent
ORDER = (
    "files", "families", "plan", "schedules", "config", "sites", "anatomy", "importance", "costs", "allocate",
    "layerwise", "batches", "losses", "checks", "calibrate", "surgery", "undo", "latency", "checkpoint", "repair",
    "sequential", "oneshot", "opening", "data", "evaluation", "report", "export", "arguments", "callbacks", "distill",
    "teaching", "rounds", "resume", "saving", "trainer",
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


# in the package checkpoint, each file imports only those before it
CHECKPOINT = ("__init__", "directory", "layout", "history", "loader", "convert", "remote_code", "proof", "save")


def beside(path):
    """The files of its own folder that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted((PACKAGE / "checkpoint").glob("*.py")), ids=lambda path: path.stem)
def test_files_of_a_checkpoint_import_in_one_order(path):
    assert set(beside(path)) <= set(CHECKPOINT[: CHECKPOINT.index(path.stem)])


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


def attributes_read(*trees):
    """Names of attributes that are read anywhere, also by `getattr`."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    asked = [node.args[1] for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr"]
    return read | {name.value for name in asked if isinstance(name, ast.Constant)}


@pytest.mark.parametrize("row", [Attention, FFN, Stack, Family])
def test_every_column_of_a_family_is_read(row):
    """Outside families.py, itself or through a property of the row."""
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "families.py"]
    read = attributes_read(*(ast.parse(path.read_text()) for path in others))
    by_property = {
        name: attributes_read(ast.parse(textwrap.dedent(inspect.getsource(value.fget))))
        for name, value in vars(row).items()
        if isinstance(value, property)
    }
    for name, columns in by_property.items():
        read |= columns if name in read else set()
    assert {field.name for field in fields(row)} - read == set()


# --- the files around the package ------------------------------------------------------------------------------------

ROOT = PACKAGE.parent


def test_contributing_names_files_that_exist():
    named = set(re.findall(r"`((?:hf_prune|examples|recipes|tests)/[^`]*)`", (ROOT / "CONTRIBUTING.md").read_text()))
    assert len(named) > 15
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_the_floors_are_those_that_the_suite_runs_on():
    """What pyproject.toml allows at least is what `make test-floor` installs. (ONNX has younger floors of its own.)"""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["plots"], *extras["gguf"]]
    floors = {}
    for requirement in map(Requirement, wanted):
        (floors[requirement.name],) = [part.version for part in requirement.specifier if part.operator == ">="]
    lines = (ROOT / "constraints-floor.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert {name: Version(pins.get(name, "0")) for name in floors} == {k: Version(v) for k, v in floors.items()}


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
