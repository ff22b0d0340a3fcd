"""Size and measured speed of models side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import at_least, directory, numbers


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="Directories or Hub ids; the first is the dense one."
    )
    command.add_argument("--batch", type=numbers, default=[1, 32], help="Batch sizes, comma-separated. Default: 1,32.")
    command.add_argument("--length", type=numbers, default=[128], help="Tokens, comma-separated. Default: 128.")
    command.add_argument("--runs", type=at_least(1), default=20, help="Timed runs of each, in turn. Default: 20.")
    command.add_argument(
        "--new-tokens", type=at_least(0), default=16, help="Decoded after the prompt. Default: 16; 0: none."
    )
    command.add_argument("--compile", action="store_true", help="Forward passes under torch.compile, too.")
    command.add_argument("--out", type=directory, help="Directory for measurements.json, .md and .png.")


def run(options: argparse.Namespace) -> None:
    from ..report.measure import compare
    from ..report.render import measured_rows, setting_line, write
    from ..report.table import console, rich_table

    names = names_of(options.models)
    shapes = [(batch, length) for length in options.length for batch in options.batch]
    found = compare(
        dict(zip(names, options.models, strict=True)),
        shapes=shapes,
        sequence_length=options.length[0],
        runs=options.runs,
        new_tokens=options.new_tokens,
        compiled=options.compile,
    )
    screen = console()
    screen.print(rich_table(measured_rows(found)))
    screen.print(setting_line(found), markup=False)
    for name, row in found.items():
        for note in row["notes"]:
            screen.print(f"{name} is {note}", markup=False)
    if options.out:
        write(found, options.out)
        screen.print(f"Written: {options.out}/measurements.*", markup=False)


def names_of(models: list[str]) -> list[str]:
    """The shortest ends of the paths by which all of them differ."""
    for parts in range(1, 100):
        names = ["/".join(Path(model).parts[-parts:]) for model in models]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{models}: the same model twice.")
