"""Strings from files and users, made safe to stand in Markdown."""

from __future__ import annotations

import html
import re
from typing import Any


def line(text: Any) -> str:
    """The text on one line, in characters that a UTF-8 file can hold."""
    return " ".join(str(text).encode(errors="replace").decode().split())


def quoted(text: Any) -> str:
    """The text as plain words: nothing in it is read as HTML, a link, code, or the end of a table's cell."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(line(text), quote=False))


def code(text: Any) -> str:
    """The text as inline code."""
    return f"`{line(text).replace('`', chr(39))}`"


def fenced(text: str, language: str = "") -> str:
    """The text as a code block whose fence is longer than any that it holds."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
