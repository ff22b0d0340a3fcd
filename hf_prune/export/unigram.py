"""A Unigram tokenizer (T5, XLM-R and language models in their manner) as llama.cpp keeps it: pieces and their scores.

llama.cpp normalises with the table of characters that the tokenizer brings, puts a mark for each space, and finds the
pieces that score highest together. Where several spaces are read as one, it also drops the space at the end of a text
and before an added token, which transformers' tokenizers keep.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

MARK = "▁"
KNOWN = ("Precompiled", "Replace", "Strip")  # normalizers that llama.cpp has
SPLITS = ("Metaspace", "WhitespaceSplit")


def pieces(parts: Mapping[str, Any]) -> list[tuple[bytes, float, str]]:
    """Of a tokenizer.json, each token with its score and llama.cpp's name for what it is, by id."""
    model = parts["model"]
    found = {number: (text, score, "NORMAL") for number, (text, score) in enumerate(model["vocab"])}
    for added in parts.get("added_tokens", ()):
        score = found.get(added["id"], ("", 0.0))[1]
        found[added["id"]] = added["content"], score, "CONTROL" if added["special"] else "USER_DEFINED"
    if model.get("unk_id") is not None:
        found[model["unk_id"]] = (*found[model["unk_id"]][:2], "UNKNOWN")
    return [(text.encode(), score, kind) for _, (text, score, kind) in sorted(found.items())]


def check(parts: Mapping[str, Any]) -> None:
    """Raise ValueError for what llama.cpp does otherwise."""
    normalizers, splits = _steps(parts, "normalizer"), _steps(parts, "pre_tokenizer")
    other = [step["type"] for step in normalizers if step["type"] not in KNOWN or not _is_about_spaces(step)]
    other += [step["type"] for step in splits if step["type"] not in SPLITS]
    if parts["model"].get("byte_fallback"):
        other.append("byte_fallback")
    if other or not any(step["type"] == "Metaspace" for step in splits):
        raise ValueError(
            f"llama.cpp: of Unigram tokenizers those with marks for spaces (Metaspace) and no more than a table of "
            f"characters are written; this one has {', '.join(other) or 'no Metaspace'}. Export to ONNX."
        )


def charsmap(parts: Mapping[str, Any]) -> bytes:
    """The table by which characters are normalised; empty where there is none."""
    held = [step.get("precompiled_charsmap") or "" for step in _steps(parts, "normalizer")]
    return base64.b64decode(next((text for text in held if text), ""))


def joins_spaces(parts: Mapping[str, Any]) -> bool:
    """Whether several spaces are read as one."""
    kinds = [step["type"] for step in _steps(parts, "pre_tokenizer")]
    return "WhitespaceSplit" in kinds or any(step["type"] == "Replace" for step in _steps(parts, "normalizer"))


def _steps(parts: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, also of one that is a sequence."""
    held = parts.get(key) or {"type": "Sequence"}
    return held.get(f"{key}s", held.get("pretokenizers", [])) if held["type"] == "Sequence" else [held]


def _is_about_spaces(step: Mapping[str, Any]) -> bool:
    """Of Replace: it makes one space, or its mark, of several."""
    given = step.get("pattern", {}).get("Regex", "")
    return step["type"] != "Replace" or (given == " {2,}" and step["content"] in (" ", MARK))
