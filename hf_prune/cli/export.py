"""Write a checkpoint in the format of another engine."""

from __future__ import annotations

import argparse
from typing import Any

from .common import model_arguments, open_model, path, tokenizer_argument


def arguments(command: argparse.ArgumentParser) -> None:
    model_arguments(command)
    tokenizer_argument(command)
    command.add_argument("--to", required=True, choices=FORMATS, help="The format.")
    command.add_argument("--int8", action="store_true", help="onnx: INT8 weights, activations quantised as they come.")
    command.add_argument("--type", choices=("f16", "f32"), default="f16", help="gguf: of the matrices. Default: f16.")
    command.add_argument("--out", type=path, required=True, help="onnx, decilm: a directory; gguf: a file.")
    command.add_argument("--overwrite", action="store_true", help="Replace what is there.")


def run(options: argparse.Namespace) -> None:
    if options.int8 and options.to != "onnx":
        raise ValueError(
            "--int8 goes with --to onnx; llama.cpp's own llama-quantize makes smaller types of a GGUF file."
        )
    from ..data.opening import load_processor
    from ..report.table import console

    model, own = open_model(options), options.tokenizer is None
    processor = load_processor(model, options.model if own else options.tokenizer, options.revision if own else None)
    console().print(FORMATS[options.to](model, processor, options), markup=False)


def _onnx(model: Any, processor: Any, options: argparse.Namespace) -> str:
    from ..export.onnx import to_onnx
    from ..report.measure import directory_bytes

    given = {"int8": options.int8, "processing_class": processor, "overwrite": options.overwrite}
    difference = to_onnx(model, options.out, **given)
    return (
        f"{options.out}: {directory_bytes(options.out) / 1e6:.1f} MB, run by ONNX Runtime; its outputs differ from "
        f"torch's by {difference:.0e} of the largest."
    )


def _gguf(model: Any, processor: Any, options: argparse.Namespace) -> str:
    from ..export.gguf import to_gguf

    path = to_gguf(model, options.out, processor, dtype=options.type, overwrite=options.overwrite)
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB; not run by llama.cpp here."


def _decilm(model: Any, processor: Any, options: argparse.Namespace) -> str:
    from ..export.decilm import to_decilm
    from ..report.measure import directory_bytes

    engines = to_decilm(model, options.out, processor, overwrite=options.overwrite)
    return (
        f"{options.out}: {directory_bytes(options.out) / 1e6:.1f} MB, for {' and '.join(engines)} with "
        "--trust-remote-code; not run by them here."
    )


FORMATS = {"onnx": _onnx, "gguf": _gguf, "decilm": _decilm}
