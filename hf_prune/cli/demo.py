"""A real model cut to half in three shapes, in one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import directory


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=directory, default=Path("demo_out"), help="Where the models and table.json go.")
    command.add_argument("--cache", type=directory, default=Path(".cache/demo"), help="Keeps the fine-tuned model.")
    command.add_argument("--quick", action="store_true", help="A few rows only: does it run? Its figures mean nothing.")


def run(options: argparse.Namespace) -> None:
    from hf_prune.demo.run import QUICK, Settings, run  # the files of examples/demo, see pyproject.toml

    run(options.out, options.cache, QUICK if options.quick else Settings())
