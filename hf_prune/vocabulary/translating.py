"""Rows that are tokenised already, in the tokens of a trimmed tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from .backend import BYTES, contents, plain, symbols

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Translate = Callable[[Sequence[int]], list[int]]


def translator(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> Translate:
    """A function from a row of ids of `before` to the row of `after`, which is `before` with fewer tokens.

    Added and special tokens stay in their places, and negative ids (labels of -100) stay what they are. Where a removed
    token occurs, the text between these is tokenised anew. If its ids do not say what the text was (a row that starts
    within a word), each half is treated so; a single removed token is spelled out. The function raises ValueError for
    an id that `before` has not.
    """
    model = contents(before)["model"]
    tokens = {i: token for token, i in before.get_vocab().items()}
    ids_after = after.get_vocab()
    mapping = {i: ids_after[token] for i, token in tokens.items() if token in ids_after}
    added = {*before.added_tokens_decoder}

    def spelled(token: str) -> list[int]:
        parts = [[s] if s in ids_after else [BYTES[byte] for byte in s.encode()] for s in symbols(token, model)]
        return [ids_after[part] for spelling in parts for part in spelling]

    def tokenised(ids: list[int]) -> list[int]:
        if mapping.keys() >= {*ids}:
            return [mapping[i] for i in ids]
        with plain(before) as old, plain(after) as new:
            text = old.decode(ids, skip_special_tokens=False)
            if old.encode(text, add_special_tokens=False).ids == ids:
                return list(new.encode(text, add_special_tokens=False).ids)
        half = len(ids) // 2
        return [*tokenised(ids[:half]), *tokenised(ids[half:])] if half else spelled(tokens[ids[0]])

    def translate(row: Sequence[int]) -> list[int]:
        unknown = [i for i in row if i >= 0 and i not in tokens]
        if unknown:
            raise ValueError(
                f"The row holds the id {unknown[0]}, and the tokenizer, of {len(tokens)} tokens, has no such token. "
                "Tokenise the data with the tokenizer that the model was trained with."
            )
        groups = groupby(row, key=lambda i: i < 0 or i in added)
        return [i for fixed, ids in groups for i in ([mapping.get(i, i) for i in ids] if fixed else tokenised([*ids]))]

    return translate
