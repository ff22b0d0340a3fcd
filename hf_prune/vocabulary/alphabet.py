"""The tokens that any text can be spelled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .backend import BYTES, SPACE, model_vocabulary, symbols


def alphabet(model: Mapping[str, Any]) -> set[int]:
    """Ids of what any text can be spelled with, of a model as tokenizer.json holds it.

    They are the 256 bytes where unknown characters fall back on them, else every character, as it is written at the
    start of a word and inside. A token with a character that is no token by itself counts as one: nothing else could
    stand for it.
    """
    vocabulary = model_vocabulary(model)
    return {*_spelling(model, vocabulary), *_of_unigram(model)}


def _spelling(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> set[int]:
    if model.get("byte_fallback") and vocabulary.keys() >= {*BYTES}:
        return {vocabulary[token] for token in (*BYTES, SPACE) if token in vocabulary}  # spaces come before bytes
    spelled = {i: symbols(token, model) for token, i in vocabulary.items()}
    return {i for i, parts in spelled.items() if len(parts) < 2 or not vocabulary.keys() >= {*parts}}


def _of_unigram(model: Mapping[str, Any]) -> set[int]:
    """Up to the unknown token, whose id some classes fix; and the least likely one: an unknown one costs 10 more."""
    if model["type"] != "Unigram":
        return set()
    least_likely = min(range(len(model["vocab"])), key=lambda i: model["vocab"][i][1])
    return {*range((model["unk_id"] or 0) + 1), least_likely}
