"""What opens a saved checkpoint, and the lines that do so; read off its config.json alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import auto_classes
from ..data import TASKS, WITHOUT_PIPELINE
from ..layout import KEY
from .table import Row

NOT_RUN = "not run in our tests"
PLAIN = "plain transformers"
LLAMA_CPP = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
CAUSAL = (*LLAMA_CPP, "phi3")


@dataclass(frozen=True)
class Engine:
    """What an engine takes: `stock` families as they are, and any shapes where `others` says how."""

    name: str
    stock: tuple[str, ...]  # model types that it brings code for; () is all
    others: str = ""  # how it takes uniform and per_layer checkpoints; empty: it does not
    how: str = ""  # by what it takes stock ones
    is_run: bool = False  # in our tests


ENGINES: Sequence[Engine] = (
    Engine("transformers", (), "after `import hf_prune`, or with trust_remote_code (remote_code=True)", "", True),
    Engine("ONNX Runtime", (), "`hf-prune export --to onnx`", "`hf-prune export --to onnx`", True),
    Engine("llama.cpp", LLAMA_CPP, "", "`hf-prune export --to gguf`", True),
    Engine("vLLM", (*CAUSAL, "gpt2", "opt", "bert", "roberta")),
    Engine("SGLang", (*CAUSAL, "gpt2", "bert")),
    Engine("TEI", ("bert", "roberta", "distilbert", "mistral", "qwen2", "qwen3", "gemma3_text")),
)


def verdict(engine: Engine, model_type: str, is_stock: bool) -> str:
    """Whether an engine opens a checkpoint of this family and form."""
    if engine.stock and model_type not in engine.stock:
        return f"no: it has no {model_type}"
    if is_stock:
        said = f"yes, by {engine.how}" if engine.how else "yes"
    elif engine.others:
        said = engine.others
    else:
        return "no: its own code builds every layer alike; export to ONNX, or prune with shapes='stock'"
    return said if engine.is_run else f"{said} ({NOT_RUN})"


def engine_rows(model_type: str) -> list[Row]:
    """What opens which result of a family."""
    return [
        {"engine": e.name, "stock": verdict(e, model_type, True), "other shapes": verdict(e, model_type, False)}
        for e in ENGINES
    ]


def checkpoint_rows(directory: str | os.PathLike[str]) -> list[Row]:
    """What opens this checkpoint."""
    config = _config(directory)
    is_stock = opened_by(directory) == PLAIN
    return [{"engine": e.name, "opens it": verdict(e, config["model_type"], is_stock)} for e in ENGINES]


def _config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    return json.loads((Path(directory) / "config.json").read_text())


def opened_by(directory: str | os.PathLike[str]) -> str:
    config = _config(directory)
    if config.get(KEY, {}).get("shapes", "stock") == "stock":
        return PLAIN
    return "transformers, trust_remote_code" if "auto_map" in config else "transformers + import hf_prune"


def opening_lines(directory: str | os.PathLike[str], name: str | None = None) -> list[str]:
    """Python that opens a saved model, called `name` where it is opened."""
    import transformers

    config = _config(directory)
    door = opened_by(directory)
    auto = auto_classes(getattr(transformers, config["architectures"][0]), config["model_type"])[0]
    task = next((task for task, name in TASKS.items() if name == auto and task not in WITHOUT_PIPELINE), None)
    option = ", trust_remote_code=True" if door.endswith("trust_remote_code") else ""
    name = name or str(directory)
    lines = ["import hf_prune"] if door.endswith("hf_prune") else []
    lines.append(f"from transformers import {auto}{', pipeline' if task else ''}")
    lines.append(f'model = {auto}.from_pretrained("{name}"{option})')
    return [*lines, f'pipe = pipeline("{task}", "{name}"{option})'] if task else lines
