"""Write a checkpoint in the format of another engine, and prove it there."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import model_arguments, open_model


def arguments(command: argparse.ArgumentParser) -> None:
    model_arguments(command)
    command.add_argument("--to", required=True, choices=("onnx",), help="The format.")
    command.add_argument("--int8", action="store_true", help="Weights in INT8, activations quantised as they come.")
    command.add_argument("--out", type=Path, required=True, help="Directory to write to.")
    command.add_argument("--overwrite", action="store_true", help="Replace an output directory that is not empty.")


def run(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from ..export.onnx import to_onnx
    from ..report.measure import directory_bytes
    from ..report.table import console

    model = open_model(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model, revision=options.revision)
    given = {"int8": options.int8, "processing_class": tokenizer, "overwrite": options.overwrite}
    difference = to_onnx(model, options.out, **given)
    console().print(
        f"{options.out}: {directory_bytes(options.out) / 1e6:.1f} MB, run by ONNX Runtime; its outputs differ from "
        f"torch's by {difference:.0e} of the largest.",
        markup=False,
    )
