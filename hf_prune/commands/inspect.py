"""What can be removed from a model, and what opens it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import PruningConfig
from .common import config_argument, model_arguments, open_model


def arguments(command: argparse.ArgumentParser) -> None:
    model_arguments(command)
    config_argument(command, "sequence_length")


def run(options: argparse.Namespace) -> None:
    from ..anatomy import describe
    from ..checkpoint.history import PLAN_FILE
    from ..report.anatomy import anatomy_rows, facts, reachable_rows, stock_note
    from ..report.engines import checkpoint_rows, engine_rows
    from ..report.table import console, rich_table

    model = open_model(options)
    anatomy = describe(model)
    screen = console()
    length = getattr(options, "sequence_length", PruningConfig.sequence_length)
    for line in facts(model, anatomy, options.model, length):
        screen.print(line, markup=False)
    screen.print(rich_table(anatomy_rows(anatomy, length), title="What can be removed"))
    screen.print(stock_note(anatomy), markup=False)
    least = reachable_rows(anatomy, length, model.device.type)
    screen.print(rich_table(least, title=f"Least share that can remain, at {anatomy.tokens(length)} tokens"))
    if (Path(options.model) / PLAN_FILE).is_file():
        screen.print(rich_table(checkpoint_rows(options.model), title="What opens this checkpoint"))
    else:
        screen.print(rich_table(engine_rows(anatomy.model_type), title="What opens which result"))
