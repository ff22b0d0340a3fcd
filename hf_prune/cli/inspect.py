"""What can be removed from a model, and what opens it."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from ..config import PruningConfig
from .common import config_argument, model_arguments, open_model


def arguments(command: argparse.ArgumentParser) -> None:
    model_arguments(command)
    config_argument(command, "sequence_length")


def run(options: argparse.Namespace) -> None:
    from ..checkpoint.history import PLAN_FILE
    from ..checkpoint.proof import PROOF_FILE
    from ..model.anatomy import describe
    from ..model.offload import device_of
    from ..report.anatomy import anatomy_rows, facts, reachable_rows, stock_note
    from ..report.engines import checkpoint_rows, engine_rows
    from ..report.table import console, rich_table

    if Path(options.model, PLAN_FILE).is_file() or Path(options.model, PROOF_FILE).is_file():
        _check(options.model)
    model = open_model(options)
    anatomy = describe(model)
    screen = console()
    length = getattr(options, "sequence_length", PruningConfig.sequence_length)
    for line in facts(model, anatomy, options.model, length):
        screen.print(line, markup=False)
    screen.print(rich_table(anatomy_rows(anatomy, length), title="What can be removed"))
    screen.print(stock_note(anatomy), markup=False)
    least = reachable_rows(anatomy, length, device_of(model).type)
    screen.print(rich_table(least, title=f"Least share that can remain, at {anatomy.tokens(length)} tokens"))
    if (Path(options.model) / PLAN_FILE).is_file():
        screen.print(rich_table(checkpoint_rows(options.model), title="What opens this checkpoint"))
    else:
        screen.print(rich_table(engine_rows(anatomy.model_type), title="What opens which result"))


def _check(directory: str) -> None:
    """Warn if a checkpoint has changed since it was proven to reload; raise ValueError if its config cannot be read."""
    from ..checkpoint.proof import verify
    from ..report.engines import config_of

    config_of(directory)
    try:
        verify(directory)
    except ValueError as error:
        warnings.warn(str(error), stacklevel=2)
