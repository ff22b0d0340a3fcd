"""Small files: written whole or not at all, and read with a plain error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Under another name first, so that a reader or a killed process never sees half of it."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        FileNotFoundError: no such file. ValueError: it holds something else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}.") from error
    return parse_json(text, str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """The mapping that a text holds; `name` says in an error what was read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}. Restore it, or make it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds a JSON {type(found).__name__}; a mapping is needed.")
    return found
