"""Rules of the house that matter, as tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import HfArgumentParser, TrainingArguments

import hf_prune
from hf_prune import DistillationConfig, PruningConfig, PruningPlan
from hf_prune.config import (
    PRESETS,
    UNIT_CHOICES,
    Allocation,
    Criterion,
    LayerCriterion,
    Metric,
    Repair,
    Schedule,
    Scope,
    Shapes,
)
from hf_prune.decide.costs import COSTS
from hf_prune.model.axes import Argument, Axis, Count, Family, Part, Stack, Sublayer
from hf_prune.model.families import FAMILIES
from hf_prune.plan import Kept
from hf_prune.schedules import SCHEDULES
from hf_prune.score.criteria import CRITERIA
from hf_prune.score.depth import BY_DISTANCE

PACKAGE = Path(hf_prune.__file__).parent
ROOT = PACKAGE.parent
KINS = (
    "words",
    "encoders",
    "decoders",
    "encoder_decoders",
    "vision",
    "speech",
    "multimodal",
)  # of the rows of families
# a room imports from those before it, and a file from those before it in its room; the examples and users import all
ROOMS: dict[str, tuple[str, ...]] = {
    "files": (), "plan": (), "schedules": (), "config": (),
    "model": (
        "axes", *(f"families/{kin}" for kin in KINS), "families/__init__", "configs", "sites", "patched", "memory",
        "offload", "shelf", "cut", "along", "silence", "undo", "weights", "outside", "patches", "maps", "tokens",
        "embeddings", "depth", "probe", "smaller", "feed", "instance", "effects", "reading", "experts", "sublayers",
        "mixtures", "derive", "prove", "lookup", "wide", "anatomy", "mask",
        "layerwise", "batches",
    ),
    "checkpoint": (
        "directory", "layout", "history", "loader", "convert", "remote_code", "proof", "save", "shards", "hub",
    ),
    "vocabulary": (
        "backend", "reading", "counting", "renumbering", "merges", "templates", "alphabet", "fitting", "choosing",
        "translating", "rows", "trimming", "proof", "choice",
    ),
    "score": (
        "factor", "losses", "passes", "checks", "criteria", "experts", "statistics", "scoring", "judge", "depth",
        "width",
    ),
    "decide": (
        "units", "ranking", "knapsack", "costs", "allocate", "prices", "latency/table", "latency/clock",
        "latency/cache", "latency/watch",
    ),
    "repair": ("solve", "experts", "width", "running", "walk"),
    "execute": (), "search": (),
    "oneshot": (),
    "train": (
        "distill", "arguments", "fit", "adapters", "callback", "teacher", "rounds", "resume", "card", "saver",
        "trainer",
    ),
    "data": ("opening", "texts", "evaluation"),
    "streaming": (),
    "export": ("kernels", "shared", "onnx", "unigram", "gguf", "decilm"),
    "report": (
        "table", "quote", "plots", "render", "families", "check", "anatomy", "estimate", "resident", "measure", "int8",
        "engines", "evidence", "card",
    ),
    "cli": (
        "common", "recipe", "bench", "card", "check", "demo", "export", "families", "inspect", "prune", "push", "train",
        "main",
    ),
}  # fmt: skip
EXCEPTIONS = {("train/card", "report")}  # the card of what a trainer saves, imported when it is written


def imports(path):
    """(name, level) of every import anywhere in a file; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.level
        elif isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.level) for alias in node.names)


def place(module):
    """(room, file) of a module's path, without its ending; the file is "" where the room is one file."""
    room, *rest = module.relative_to(PACKAGE).parts
    return room, "/".join(rest)


def own(path):
    """(room, file) of every module of hf_prune that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            home = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            is_file = home.with_suffix(".py").is_file()
            files = [home / alias.name for alias in node.names]
            inside = [
                path if path.with_suffix(".py").is_file() or path.is_dir() else home / "__init__" for path in files
            ]
            yield from map(place, [home] if is_file else inside)


def files_of(room):
    """{file: path} of a room, also in packages inside it."""
    paths = (PACKAGE / room).rglob("*.py") if ROOMS[room] else [PACKAGE / f"{room}.py"]
    return {place(path.with_suffix(""))[1]: path for path in sorted(paths)}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_from_those_before_them(room):
    order = list(ROOMS)
    for name, path in files_of(room).items():
        allowed = {*order[: order.index(room) + 1]}
        allowed |= {other for who, other in EXCEPTIONS if who in (room, f"{room}/{name}")}
        assert [other for other, _ in own(path) if other not in allowed] == [], path


@pytest.mark.parametrize("room", [room for room, files in ROOMS.items() if files])
def test_files_of_a_room_import_from_those_before_them(room):
    files = ROOMS[room]
    for name, path in files_of(room).items():
        before = files[: files.index(name)] if name in files else files
        assert [other for where, other in own(path) if where == room and other not in before] == [], path


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == {n for n, files in ROOMS.items() if not files}
    for room, files in ROOMS.items():
        if files:
            named = {name for name in files_of(room) if not name.endswith("__init__")}
            assert named == {name for name in files if not name.endswith("__init__")}


def test_every_package_is_installed():
    """pyproject.toml lists the packages, as `hf_prune.demo` lies outside the package's directory."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = setuptools["package-dir"]
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert {*setuptools["packages"]} == there | {*places}
    assert all((ROOT / home / "__init__.py").is_file() for home in places.values())
    for pattern in setuptools["package-data"]["hf_prune"]:
        assert list(PACKAGE.glob(pattern)), pattern


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("files", set()), *((f"model/families/{kin}", set()) for kin in (*KINS, "__init__")), ("plan", set()),
        ("schedules", set()), ("config", {"yaml"}),
    ],
)  # fmt: skip
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


def test_import_loads_the_loader_and_what_it_needs():
    loaded = ast.literal_eval(run("import sys, hf_prune; print([m for m in sys.modules if m.startswith('hf_prune.')])"))
    rows = ("families", *(f"families.{kin}" for kin in KINS))
    needed = {"checkpoint": ("layout", "loader"), "model": ("axes", "configs", "cut", *rows, "sites")}
    assert {*loaded} == {f"hf_prune.{room}" for room in needed} | {
        f"hf_prune.{room}.{file}" for room, files in needed.items() for file in files
    }


def test_the_trainer_imports_neither_exports_nor_cards():
    code = "import sys; from hf_prune import PruningTrainer; print([m for m in sys.modules if 'hf_prune.' in m])"
    rooms = {name.split(".")[1] for name in ast.literal_eval(run(code))}
    assert "train" in rooms
    assert rooms & {"data", "report", "export", "cli"} == set()


def test_public_names_exist_and_are_documented():
    assert list(hf_prune.__all__) == sorted(hf_prune.__all__)
    for name in hf_prune.__all__:
        assert getattr(hf_prune, name).__doc__, name
    assert dir(hf_prune) == list(hf_prune.__all__)


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'prun'.*prune"):
        hf_prune.prun  # noqa: B018


def test_no_print_in_the_library():
    talkers = {"cli"}
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] in talkers:
            continue
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_no_two_parts_of_the_generated_file_share_a_name():
    """All of them lie in one module there, and a later one would take an earlier one's place."""
    from hf_prune.checkpoint.remote_code import PARTS

    found = []
    for part in PARTS:
        for node in ast.parse(Path(part.__file__).read_text()).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found += [node.name] if hasattr(node, "name") else [t.id for t in targets if isinstance(t, ast.Name)]
    assert [name for name in found if found.count(name) > 1] == []


def test_every_family_has_a_tiny_config():
    from tiny import ALL_CLASSES, CONFIGS

    assert set(FAMILIES) == set(CONFIGS) == set(ALL_CLASSES)


ROWS = (Axis, Part, Count, Argument, Sublayer, Stack, Family)


@pytest.fixture
def read(monkeypatch):
    """The columns of family rows that the library reads from now on, outside the table itself."""
    found = set()

    def watch(row, names):
        def get(self, name):
            caller = Path(sys._getframe(1).f_code.co_filename)
            if name in names and PACKAGE in caller.parents and caller.parent.name != "families":
                found.add(f"{row.__name__}.{name}")
            return object.__getattribute__(self, name)

        return get

    for row in ROWS:
        monkeypatch.setattr(row, "__getattribute__", watch(row, {field.name for field in fields(row)}))
    return found


@pytest.mark.filterwarnings("ignore:.*calibration tokens to refit")
def test_every_column_of_a_row_is_read(read, tmp_path):
    """While models are pruned and saved, one of them as another family's and one without its last layers."""
    from tiny import keep, tiny, tiny_batch, within_reach

    for name in (
        "LlamaForCausalLM",
        "T5ForConditionalGeneration",
        "Gemma2ForCausalLM",
        "OPTForCausalLM",
        "DeepseekV3ForCausalLM",
    ):
        model = tiny(name)
        data = [tiny_batch(model, batch=32)]
        hf_prune.prune(model, data, within_reach(model, PruningConfig(metric="params", shapes="uniform")))
        hf_prune.save_pretrained(model, tmp_path / name, model_type="mistral" if name.startswith("Llama") else None)
    model = tiny("T5ForConditionalGeneration")
    data = [tiny_batch(model)]
    sites = [keep(site) for site in hf_prune.describe(model).sites if site.layer == 0]
    layers = [Kept((stack,), "layers", 2, (0,)) for stack in ("encoder", "decoder")]
    hf_prune.prune(model, data, PruningConfig(repair="none"), plan=PruningPlan("t5", (*layers, *sites)))
    assert {f"{row.__name__}.{field.name}" for row in ROWS for field in fields(row)} - read == set()


# --- the files around the package ------------------------------------------------------------------------------------


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
    "shapes": "per_layer", "align": 16, "repair": "bias", "batch_norm": False,
    "calibration_samples": 64, "calibration_seed": 3,
    "sequence_length": 77, "latency_batch_size": 4, "allocation": "ratio",
    "layer_criterion": "sleb", "min_count": 2, "max_tokens": 5000, "candidates": 2,
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
    assert set(get_args(Metric)) == {*COSTS, "latency"}
    assert set(get_args(Scope)) == {"model", "blocks"}
    assert set(get_args(Allocation)) == {"loss", "ratio"}
    assert set(get_args(Shapes)) == {"stock", "uniform", "per_layer"}
    assert set(get_args(Schedule)) == set(SCHEDULES)
    assert set(get_args(LayerCriterion)) == {*BY_DISTANCE, "sleb", "random"}
    assert set(get_args(Repair)) == {"least_squares", "rescale", "bias", "none"}
    assert UNIT_CHOICES == ("heads", "kv_groups", "neurons", "channels", "experts", "layers", "tokens", "hidden")
