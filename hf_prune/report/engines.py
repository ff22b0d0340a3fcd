"""What opens a saved checkpoint, and the lines that do so; read off its config.json alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.convert import auto_classes
from ..checkpoint.layout import KEY, checked
from ..checkpoint.proof import checkpoint
from ..data.opening import TASKS, WITHOUT_PIPELINE
from ..export.decilm import FAMILIES, STEP
from ..export.gguf import ARCHITECTURES
from ..files import read_json
from .table import Row

NOT_RUN = "not run in our tests"
PLAIN = "plain transformers"
CAUSAL = (*ARCHITECTURES, "phi3")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe")
HEAD = "ForCausalLM"
GGUF = "`hf-prune export --to gguf`"
DECILM = "by `hf-prune export --to decilm`, with the same query heads in every layer"
PLUG_IN = "where hf_prune is installed beside it"
STEPS = f"FFN widths in multiples of {STEP}"


@dataclass(frozen=True)
class Engine:
    """What an engine takes: `stock` families as they are, and other shapes where `others` says how."""

    name: str
    stock: tuple[str, ...]  # model types that it brings code for; () is all
    others: str = ""  # how it takes uniform and per_layer checkpoints; empty: it does not
    how: str = ""  # by what it takes stock ones
    is_run: bool = False  # in our tests
    head: str = ""  # in the name of the classes that it takes
    other_types: tuple[str, ...] = ()  # model types for which `others` holds; () is all
    other_head: str = ""  # in the name of the classes for which `others` holds
    run_types: tuple[str, ...] = ()  # model types that our tests run; () is all, where they run any


BY_LAYER = tuple(name for name, row in ARCHITECTURES.items() if row.by_layer)
ENGINES: Sequence[Engine] = (
    Engine("transformers", (), "after `import hf_prune`, or with trust_remote_code (remote_code=True)", "", True),
    Engine("ONNX Runtime", (), "`hf-prune export --to onnx`", "`hf-prune export --to onnx`", True),
    Engine("llama.cpp", tuple(ARCHITECTURES), f"by {GGUF}", GGUF, True, HEAD, BY_LAYER),
    Engine(
        "vLLM", (*CAUSAL, *MIXTURES, "gpt2", "opt", "bert", "roberta"), DECILM, "", True, "", FAMILIES, HEAD, ("llama",)
    ),
    Engine("vLLM --model-impl transformers", CAUSAL, PLUG_IN, "", True, HEAD, run_types=("llama",)),
    Engine("SGLang", (*CAUSAL, *MIXTURES, "gpt2", "bert"), f"{DECILM} and {STEPS}", "", False, "", FAMILIES, HEAD),
    Engine("TEI", ("bert", "roberta", "distilbert", "mistral", "qwen2", "qwen3", "gemma3_text")),
)


def verdict(engine: Engine, model_type: str, is_stock: bool, class_name: str = "") -> str:
    """Whether an engine opens a checkpoint of this family and form, and this class where that is known."""
    if engine.stock and model_type not in engine.stock:
        return f"no: it has no {model_type}"
    if class_name and engine.head not in class_name:
        return f"no: it has no {class_name}"
    if is_stock:
        said = f"yes, by {engine.how}" if engine.how else "yes"
    elif _takes_others(engine, model_type, class_name):
        said = engine.others
    else:
        return "no: its own code builds every layer alike; export to ONNX, or prune with shapes='stock'"
    is_run = engine.is_run and (not engine.run_types or model_type in engine.run_types)
    return said if is_run else f"{said} ({NOT_RUN})"


def _takes_others(engine: Engine, model_type: str, class_name: str) -> bool:
    named = not class_name or engine.other_head in class_name
    return bool(engine.others) and named and (not engine.other_types or model_type in engine.other_types)


def engine_rows(model_type: str) -> list[Row]:
    """What opens which result of a family."""
    return [
        {"engine": e.name, "stock": verdict(e, model_type, True), "other shapes": verdict(e, model_type, False)}
        for e in ENGINES
    ]


def checkpoint_rows(directory: str | os.PathLike[str]) -> list[Row]:
    """What opens this checkpoint."""
    config = config_of(directory)
    about = (config["model_type"], opened_by(directory) == PLAIN, model_class(config).__name__)
    return [{"engine": e.name, "opens it": verdict(e, *about)} for e in ENGINES]


def config_of(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a checkpoint, whose model_type, class and pruning entry can be read.

    Raises:
        ValueError: one of them cannot. FileNotFoundError: no directory, or no config.json in it.
    """
    path = checkpoint(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Give a directory that hf_prune saved.")
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{path} names no model_type, such as 'bert'. Restore it, or save the model again.")
    model_class(config)
    return {**config, KEY: checked(config.get(KEY))}


def model_class(config: Mapping[str, Any]) -> Any:
    """The class of transformers that a config names, also where a generated file (remote code) subclasses it.

    Raises:
        ValueError: it names none.
    """
    import transformers

    named = config.get("architectures")
    name = named[0].removeprefix("Pruned") if isinstance(named, list) and named and isinstance(named[0], str) else ""
    found = getattr(transformers, name, None) if name else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"config.json names the class {str(named)[:80]!r} (architectures), which transformers has not: one like "
            "BertForSequenceClassification is needed. Restore it, or save the model again."
        )
    return found


def opened_by(directory: str | os.PathLike[str]) -> str:
    config = config_of(directory)
    if config[KEY].get("shapes", "stock") == "stock":
        return PLAIN
    return "transformers, trust_remote_code" if "auto_map" in config else "transformers + import hf_prune"


def auto_class(config: Mapping[str, Any]) -> str:
    """The Auto class for the head that a checkpoint has."""
    return auto_classes(model_class(config), config["model_type"])[0]


def task_of(config: Mapping[str, Any]) -> str | None:
    """The Hub's name of what the model is for."""
    auto = auto_class(config)
    return next((task for task, name in TASKS.items() if name == auto), None)


def opening_lines(directory: str | os.PathLike[str], name: str | None = None) -> list[str]:
    """Python that opens a saved model, called `name` where it is opened."""
    config = config_of(directory)
    door, auto, task = opened_by(directory), auto_class(config), task_of(config)
    task = None if task in WITHOUT_PIPELINE else task
    option = ", trust_remote_code=True" if door.endswith("trust_remote_code") else ""
    shown = (name or str(directory)).encode(errors="replace").decode()
    name = json.dumps(shown, ensure_ascii=False)  # quoted, in one line
    lines = ["import hf_prune"] if door.endswith("hf_prune") else []
    lines.append(f"from transformers import {auto}{', pipeline' if task else ''}")
    lines.append(f"model = {auto}.from_pretrained({name}{option})")
    return [*lines, f'pipe = pipeline("{task}", {name}{option})'] if task else lines
