"""What opens a saved checkpoint, and the lines that do so; read off its config.json alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import auto_classes
from ..data import TASKS, WITHOUT_PIPELINE
from ..layout import KEY

NOT_RUN = "not run here"
ENGINES: Sequence[tuple[str, str, str]] = (  # engine, stock checkpoint, uniform or per_layer checkpoint
    ("transformers", "yes, without hf_prune", "after `import hf_prune`, or with trust_remote_code (--remote-code)"),
    (
        "vLLM, TGI, llama.cpp",
        f"if the engine reads this stock family: config.json gives the sizes as usual; {NOT_RUN}",
        f"not expected: they bring their own modelling code; {NOT_RUN}",
    ),
    (
        "ONNX, OpenVINO",
        f"transformers.exporters takes the loaded model; {NOT_RUN}",
        f"transformers.exporters takes the loaded model; {NOT_RUN}",
    ),
)
PLAIN = "plain transformers"


def _config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    return json.loads((Path(directory) / "config.json").read_text())


def opened_by(directory: str | os.PathLike[str]) -> str:
    config = _config(directory)
    if config.get(KEY, {}).get("shapes", "stock") == "stock":
        return PLAIN
    return "transformers, trust_remote_code" if "auto_map" in config else "transformers + import hf_prune"


def opening_lines(directory: str | os.PathLike[str]) -> list[str]:
    """Python that opens a saved model."""
    import transformers

    config = _config(directory)
    door = opened_by(directory)
    auto = auto_classes(getattr(transformers, config["architectures"][0]), config["model_type"])[0]
    task = next((task for task, name in TASKS.items() if name == auto and task not in WITHOUT_PIPELINE), None)
    option = ", trust_remote_code=True" if door.endswith("trust_remote_code") else ""
    lines = ["import hf_prune"] if door.endswith("hf_prune") else []
    lines.append(f"from transformers import {auto}{', pipeline' if task else ''}")
    lines.append(f'model = {auto}.from_pretrained("{directory}"{option})')
    return [*lines, f'pipe = pipeline("{task}", "{directory}"{option})'] if task else lines
