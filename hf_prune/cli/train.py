"""Run a training script with the arguments of a recipe."""

from __future__ import annotations

import argparse


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="RECIPE", help="A YAML file: `script` and its arguments.")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="changes",
        help="Change an argument; repeatable.",
    )


def run(options: argparse.Namespace) -> None:
    from ..report.table import console
    from .recipe import read
    from .recipe import run as run_recipe

    metrics = run_recipe(read(options.recipe, options.changes))
    for name, value in (metrics or {}).items():
        console().print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}", markup=False)
