"""Pruning and INT8 together: dense and pruned, each in fp32 and in INT8, with one engine."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoint.proof import weights_id
from ..decide.latency.cache import device_name
from ..decide.latency.clock import synchronize
from ..export.onnx import graph_inputs, to_onnx
from ..files import write_text
from ..model.probe import random_inputs
from ..model.weights import quiet
from .measure import Clock, directory_bytes, entry, interleaved
from .table import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INT8_FILE = "int8.json"
NAMES = ("dense", "dense INT8", "pruned", "pruned INT8")
AWAKE = 0.05  # seconds of untimed calls before the timed one
INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx2")
Forward = Callable[..., Any]  # (**inputs) -> an output with logits
Evaluate = Callable[[Forward], Mapping[str, float]]
Call = Callable[[], Any]
Serve = Callable[[Mapping[str, torch.Tensor]], Call]


@dataclass(frozen=True)
class Variant:
    """One of the four models in its engine: its files, and two ways to open it.

    What `open()` gives is called as the model is; what `serve(inputs)` gives takes no arguments and is timed.
    """

    path: Path
    open: Callable[[], Forward]
    serve: Serve

    @classmethod
    def held(cls, path: Path, forward: Forward) -> Variant:
        """The variant of a model that stays open."""
        return cls(path, lambda: forward, lambda inputs: partial(forward, **inputs))


def compare_int8(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    evaluate: Evaluate | None = None,
    *,
    engine: str = "onnxruntime",
    shapes: Sequence[tuple[int, int]] = ((1, 64), (32, 64)),
    runs: int = 30,
) -> dict[str, Any]:
    """Quality, bytes on disk and latency of the four models, timed in turn; ONNX Runtime has one open at a time.

    Args:
        evaluate: metrics of a callable that is called as the model is.
        engine: "onnxruntime" (weights and embeddings in INT8) or "torchao" (the weights of linear layers).

    Returns:
        {"engine", "instructions", "device", "threads", "models": {name: {"bytes", "metrics", "latency"}}}; the
        speed-ups are over the dense model in fp32.
    """
    with tempfile.TemporaryDirectory() as scratch, quiet(dense), quiet(pruned):
        made, device = BUILDERS[engine](dense, pruned, Path(scratch))
        models: dict[str, Any] = {
            name: {
                "bytes": directory_bytes(variant.path),
                "metrics": dict(evaluate(variant.open())) if evaluate else {},
                "latency": [],
            }
            for name, variant in made.items()
        }
        for batch, length in shapes:
            inputs = graph_inputs(dense, random_inputs(dense, batch, length))
            clocks: dict[str, Clock] = {
                name: partial(_run, variant.serve, inputs, device) for name, variant in made.items()
            }
            times = interleaved(clocks, runs, 3, f"{engine}, {batch} x {length}")
            for name, found in times.items():
                at = entry("forward", found["forward"], batch, length, times["dense"]["forward"])
                models[name]["latency"].append(at)
    return {
        "engine": engine,
        "instructions": instructions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "models": models,
    }


def _run(serve: Serve, inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Seconds of one call by a process that has this model alone open and has just called it for a while."""
    call = serve(inputs)
    begun = time.perf_counter()
    while time.perf_counter() < begun + AWAKE:
        call()
        synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return {"forward": time.perf_counter() - started}


def instructions() -> str:
    """The best of this CPU's instruction sets for INT8."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    return next((name for name in INSTRUCTIONS if name in flags), "none known")


# --- engines: the four by name, and the device that they run on ------------------------------------------------------


def _onnxruntime(
    dense: PreTrainedModel, pruned: PreTrainedModel, home: Path
) -> tuple[dict[str, Variant], torch.device]:
    import onnxruntime
    from transformers.exporters import ExportedModel

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def serve(path: Path, inputs: Mapping[str, torch.Tensor]) -> Call:  # ExportedModel takes half a millisecond a call
        session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
        return partial(session.run, None, {wanted.name: inputs[wanted.name].numpy() for wanted in session.get_inputs()})

    made: dict[str, Variant] = {}
    for name, (model, int8) in _four(dense, pruned).items():
        path = home / name
        to_onnx(model, path, int8=int8)
        exported = partial(ExportedModel.from_pretrained, path, device="cpu", session_options=options)
        made[name] = Variant(path, exported, partial(serve, path))
    return made, torch.device("cpu")


def _torchao(dense: PreTrainedModel, pruned: PreTrainedModel, home: Path) -> tuple[dict[str, Variant], torch.device]:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    except ImportError as error:
        raise ImportError("torchao is missing: pip install 'hf-prune[torchao]'") from error
    from transformers import TorchAoConfig

    made: dict[str, Variant] = {}
    for name, (model, int8) in _four(dense, pruned).items():
        model.save_pretrained(home / name)
        config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig()) if int8 else None
        opened: Any = type(model).from_pretrained(home / name, quantization_config=config)
        if int8:
            opened.save_pretrained(home / f"{name} saved")
        forward = _inferring(opened.to(model.device).eval())
        path = home / (f"{name} saved" if int8 else name)
        made[name] = Variant.held(path, forward)
    return made, dense.device


def _inferring(model: PreTrainedModel) -> Forward:
    def call(**inputs: torch.Tensor) -> Any:
        with torch.inference_mode():
            return model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})

    return call


def _four(dense: PreTrainedModel, pruned: PreTrainedModel) -> dict[str, tuple[PreTrainedModel, bool]]:
    return dict(zip(NAMES, ((dense, False), (dense, True), (pruned, False), (pruned, True)), strict=True))


BUILDERS = {"onnxruntime": _onnxruntime, "torchao": _torchao}


# --- rendering -------------------------------------------------------------------------------------------------------


def int8_rows(found: Mapping[str, Any]) -> list[Row]:
    """One row a model."""
    first = found["models"][NAMES[0]]
    rows: list[Row] = []
    for name, model in found["models"].items():
        row = {"": name} | {metric: f"{value:.4f}" for metric, value in model["metrics"].items()}
        row["size"] = f"{model['bytes'] / 1e6:.1f} MB ({first['bytes'] / model['bytes']:.2f}× smaller)"
        for at in model["latency"]:
            row[f"{at['batch']} × {at['length']}"] = f"{at['median_ms']:.2f} ms ({at['speedup']:.2f}×)"
        rows.append(row)
    return rows


def int8_line(found: Mapping[str, Any]) -> str:
    runs = found["models"][NAMES[0]]["latency"]
    text = f"{found['engine']}, {found['device']} ({found['instructions']}), {found['threads']} threads"
    return f"{text}; median of {runs[0]['runs']} interleaved runs." if runs else f"{text}."


def write_int8(found: Sequence[Mapping[str, Any]], directory: str | os.PathLike[str]) -> None:
    """What one or several engines found, beside the pruned weights, for the card."""
    written = {"weights": weights_id(directory), "engines": list(found)}
    write_text(Path(directory) / INT8_FILE, json.dumps(written, indent=1) + "\n")
