"""Small files: written whole or not at all, and read with a plain error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HALF_WRITTEN = ".*.[0-9]*.tmp"  # what a process that was killed in `write_text` leaves


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Under another name first, so that a reader or a killed process never sees half of it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: str | os.PathLike[str]) -> str:
    """A file of UTF-8 text.

    Raises:
        FileNotFoundError: no such file. IsADirectoryError: a directory. ValueError: it holds something else.
        TypeError: no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"A file is named by a path, got {type(path).__name__}.")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a directory; a file is needed.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}.") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        ValueError: it holds something else, and more: see `read_text`.
    """
    return parse_json(read_text(path), str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The mapping that a text holds; `name` says in an error what was read."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:  # TypeError: of what is no text
        raise ValueError(f"{name} is no JSON: {error}. Restore it, or make it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a JSON {type(found).__name__}; a mapping is needed.")
    return found
