"""The safetensors files of a checkpoint that is read piece by piece: found, whole, and the same at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from ..files import read_json

PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
LENGTH = 8  # bytes that say how long the header is
States = dict[Path, tuple[int, int]]


def shards_of(source: str, revision: str | None = None) -> list[Path]:
    """The files that hold a checkpoint's weights, each as long as its header says and with what the index names.

    Args:
        source: a directory, or a Hub id, whose files are downloaded unless they are in the cache.

    Raises:
        FileNotFoundError: a shard is missing, or there are no safetensors. ValueError: a shard is truncated or no
            safetensors file, the index is damaged, or names a weight that its shard has not.
    """
    single = _file(source, SAFE_WEIGHTS_NAME, revision)
    if single is not None:
        header_of(single)
        return [single]
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        raise FileNotFoundError(_without_safetensors(source, revision))
    named = _named(index)
    found = {shard: _file(source, shard, revision) for shard in named}
    missing = [shard for shard, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"{source!r} lacks {', '.join(missing)} ({len(missing)} of {len(found)} shards that {index.name} names). "
            "Download or copy it again."
        )
    paths = {shard: path for shard, path in found.items() if path is not None}
    for shard, path in paths.items():
        absent = sorted(named[shard] - header_of(path).keys())
        if absent:
            raise ValueError(
                f"{index.name} says that {shard} holds {absent[0]}, and it does not ({len(absent)} such weights): they "
                "are of different saves. Download or copy all of them again."
            )
    return list(paths.values())


def _file(source: str, name: str, revision: str | None) -> Path | None:
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _named(index: Path) -> dict[str, set[str]]:
    """The weights of each shard.

    Raises:
        ValueError: the index is none.
    """
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(s, str) for s in weights.values()):
        raise ValueError(f"{index} has no weight_map from weights to files. Download or copy it again.")
    shards: dict[str, set[str]] = {}
    for weight, shard in weights.items():
        shards.setdefault(shard, set()).add(weight)
    return shards


def _without_safetensors(source: str, revision: str | None) -> str:
    pickle = next((name for name in PICKLES if _file(source, name, revision) is not None), None)
    start = f"{source!r} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}"
    if pickle is None:
        return f"{start}. Give a checkpoint that transformers saved."
    return (
        f"{start}, only {pickle}, which cannot be read piece by piece. Convert it where it fits into memory: "
        "AutoModelForCausalLM (or its class).from_pretrained(source, dtype='auto').save_pretrained('converted')."
    )


def header_of(path: Path) -> dict[str, Any]:
    """What a safetensors file says that it holds, by name.

    Raises:
        ValueError: it is truncated, or another kind of file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        text = file.read(length) if LENGTH + length <= size else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        told = LENGTH + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or only the start of one. Download or copy it again."
        ) from error
    if told != size:
        raise ValueError(
            f"{path} is {'truncated' if size < told else 'damaged'}: its header says {told:,} bytes, the file has "
            f"{size:,}. Download or copy it again."
        )
    return header


# --- the same at the end ---------------------------------------------------------------------------------------------


def states(paths: Iterable[Path]) -> States:
    """Size and time of the last change of each file."""
    return {path: (found.st_size, found.st_mtime_ns) for path in paths for found in (path.stat(),)}


def check_unchanged(before: States) -> None:
    """Raise RuntimeError for files that are not what they were."""
    changed = [path for path, state in before.items() if not path.is_file() or states([path])[path] != state]
    if changed:
        raise RuntimeError(
            f"{_listed(changed)} changed while the checkpoint was pruned, so that the weights may be of two models. "
            "Nothing was saved. Prune a copy that nobody writes to."
        )


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
