"""The proof that a trimmed tokenizer reads and writes as the whole one did."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .backend import contents
from .reading import batched, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHOWN = 100  # characters and tokens of a text in an error


def prove_texts(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, kept: Collection[int], texts: Any
) -> dict[str, int]:
    """Compare two tokenizers on `texts` (see `strings` for what they may be); `after` has only the tokens `kept`.

    A text that used only kept tokens must give the same tokens, numbered anew. Every text must decode to what it
    decoded to before. Returns how many "texts" there were, how many gave the "same" tokens, and all their tokens,
    "tokens_before" and "tokens_after".

    Raises:
        RuntimeError: a text does not; it is named.
    """
    originals, known = sorted(kept), {*kept}
    # of equally likely orders of the same tokens, rounding in a Unigram model's scores takes one
    arranged = sorted if contents(before)["model"]["type"] == "Unigram" else list
    found = {"texts": 0, "same": 0, "tokens_before": 0, "tokens_after": 0}
    for batch in batched(strings(texts)):
        for text, old, new in zip(batch, _encoded(before, batch), _encoded(after, batch), strict=True):
            renumbered = [originals[i] for i in new]
            is_wrong = known.issuperset(old) and arranged(renumbered) != arranged(old)
            if is_wrong or before.decode(old) != after.decode(new):
                raise RuntimeError(
                    f"The trimmed tokenizer reads {text[:SHOWN]!r} as {after.convert_ids_to_tokens(new[:SHOWN])}, the "
                    f"whole one as {before.convert_ids_to_tokens(old[:SHOWN])}. Leave tokens out of the units for this "
                    "tokenizer, and report its name: this is an error of hf_prune."
                )
            for key, value in zip(found, (1, renumbered == old, len(old), len(new)), strict=True):
                found[key] += value
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"]
