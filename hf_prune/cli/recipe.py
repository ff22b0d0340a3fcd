"""A recipe: the arguments of a training script, as YAML, so that a result can be made again."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import parse_yaml
from ..files import read_text

SCRIPT = "script"  # the key that names the script, relative to the recipe


def read(path: str | os.PathLike[str], changes: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a recipe, with `key=value` changes on top.

    Raises:
        FileNotFoundError: no such recipe or script. ValueError: no YAML, no mapping, no script named, a change without
            "=" or a key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe.")
    found = parse_yaml(read_text(path), str(path))
    if not isinstance(found, Mapping) or not isinstance(found.get(SCRIPT), str):
        raise ValueError(
            f"{path}: a recipe is a mapping of arguments, one of them {SCRIPT!r} (a path, from the recipe)."
        )
    changed = {**found, **dict(map(_change, changes))}
    changed[SCRIPT] = str((path.parent / str(changed[SCRIPT])).resolve())
    if not Path(changed[SCRIPT]).is_file():
        raise FileNotFoundError(f"{path} names the script {changed[SCRIPT]}, which is not there.")
    return changed


def _change(change: str) -> tuple[str, Any]:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {change}: write key=value.")
    return key.strip(), parse_yaml(value, f"--set {change}")


def line(recipe: Mapping[str, Any]) -> list[str]:
    """The command line that a recipe stands for.

    >>> line({"script": "x.py", "keep": 0.5, "units": ["heads", "neurons"], "bf16": True, "align": None})
    ['--keep', '0.5', '--units', 'heads', 'neurons', '--bf16', 'True']
    """
    words: list[str] = []
    for key, value in recipe.items():
        if key != SCRIPT and value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return words


def run(recipe: Mapping[str, Any]) -> Any:
    """Call the script's `main` with the recipe's arguments.

    Raises:
        ValueError: no Python script, or one without `main`. What the script raises.
    """
    path = Path(recipe[SCRIPT])
    spec = importlib.util.spec_from_file_location(f"hf_prune_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python script.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ValueError(f"{path} is no Python script: {error}.") from error
    if not callable(getattr(module, "main", None)):
        raise ValueError(f"{path} has no main(arguments), which a recipe's script must have.")
    return module.main(line(recipe))
