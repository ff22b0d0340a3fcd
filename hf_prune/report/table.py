"""One list of rows, shown on a terminal or written as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

Row = Mapping[str, str]
PIPE_WIDTH = 140  # columns where the output is no terminal


def columns(rows: Sequence[Row]) -> list[str]:
    """All keys, in the order in which the rows name them."""
    return list(dict.fromkeys(key for row in rows for key in row))


def rich_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The first column is what the row is about, the others are values."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns(rows)):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*(row.get(name, "–") for name in columns(rows)))
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    names = columns(rows)
    body = [[row.get(name, "–") for name in names] for row in rows]
    rule = [":--", *["--:" for _ in names[1:]]]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in [names, rule, *body])


def _cell(text: str) -> str:
    """The text on one line, with its `|` escaped."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def console() -> Console:
    """Standard output; wide where it is a file or a pipe, so that tables are not folded."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def count(number: float) -> str:
    """1234567 -> "1.23M"."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"
