"""Byte-pair merges: what a token is made of, so that it can still be made when other tokens go."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from .backend import symbols

NEVER = float("inf")


class Merges:
    """The ranked merges of a BPE model as tokenizer.json holds it (Sennrich et al. 2016)."""

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model
        self.ranks = {pair: rank for rank, pair in enumerate(map(pair_of, model["merges"]))}

    def ancestors(self, token: str) -> list[str]:
        """The tokens that merging makes on its way to `token`, from its characters on; none if it never gets there.

        Inside a longer word the way is the same: merges across the borders of a token that comes out do not happen.
        """
        parts = symbols(token, self.model)
        made = list(parts)
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, NEVER), i) for i, pair in enumerate(pairwise(parts)))
            if rank == NEVER:
                return []  # an added token, or one that only a look-up of the whole word finds
            parts[at : at + 2] = [joined(parts[at], parts[at + 1], self.model)]
            made.append(parts[at])
        return made[:-1]


def pair_of(merge: str | list[str]) -> tuple[str, str]:
    """Older files write "a b", newer ones ["a", "b"].

    >>> pair_of("th e"), pair_of(["th", "e"])
    (('th', 'e'), ('th', 'e'))
    """
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def joined(first: str, second: str, model: Mapping[str, Any]) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def kept_merges(model: Mapping[str, Any], tokens: Mapping[str, int]) -> list[list[str]]:
    """The merges of which both parts and the result are in `tokens`, in their order."""
    return [
        [first, second]
        for first, second in map(pair_of, model["merges"])
        if first in tokens and second in tokens and joined(first, second, model) in tokens
    ]
