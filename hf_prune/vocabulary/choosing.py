"""Which tokens stay: what cannot go, then those that are used, most used first.

Shapes: V token ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .alphabet import alphabet
from .backend import contents, named_ids, plain, size
from .merges import Merges
from .renumbering import named_in_configs
from .templates import template_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def protected(tokenizer: PreTrainedTokenizerBase, configs: Iterable[Any] = ()) -> set[int]:
    """Ids of tokens that cannot go, whatever the texts use.

    They are all special and added tokens; what the chat template writes; what `configs` (the model's, its generation
    config) name; and as many bytes or characters as any text needs to be tokenised without an unknown token where it
    was before. For BPE, what these are merged from is added by `chosen`.

    Raises:
        ValueError: a slow tokenizer, or one of whole words.
    """
    spec = contents(tokenizer)
    texts = template_texts(tokenizer)
    with plain(tokenizer) as encoder:
        template = encoder.encode_batch(texts, add_special_tokens=False)
    return {
        *named_ids(spec),
        *tokenizer.all_special_ids,
        *(i for encoding in template for i in encoding.ids),
        *(i for named in named_in_configs(configs, size(tokenizer)).values() for i in named),
        *alphabet(spec["model"]),
    }


def chosen(
    tokenizer: PreTrainedTokenizerBase,
    counts: NDArray[np.int64],
    needed: Collection[int],
    min_count: int = 1,
    most: int | None = None,
) -> tuple[int, ...]:
    """Sorted ids of the tokens that stay: `needed`, and the most used of those that occur at least `min_count` times.

    `counts` is [V]; `most` limits how many stay in all. For BPE every token brings the tokens that it is merged from,
    as a part of `most`. For given counts a smaller `most`, or a larger `min_count`, gives a subset.

    Raises:
        ValueError: no token is used so often, `needed` and what it is merged from are more than `most`, or counts or
            needs are of ids that the tokenizer has not.
    """
    order, first = in_order(tokenizer, needed, _used(tokenizer, counts, min_count))
    if most is not None and most < first:
        raise ValueError(
            f"{most} tokens are too few: {first} cannot go. These are special and added tokens, what the chat template "
            "and the configs name, the bytes or characters that any text is spelled with, and what they are merged "
            f"from. Keep at least {first}."
        )
    return tuple(sorted(order[:most]))


def in_order(tokenizer: PreTrainedTokenizerBase, needed: Collection[int], used: Sequence[int]) -> tuple[list[int], int]:
    """`needed`, then `used` in its order, each after all that it is merged from; and how many `needed` takes.

    So from that many on, as many of the first as one likes make a vocabulary.
    """
    model = contents(tokenizer)["model"]
    merges = Merges(model) if model["type"] == "BPE" else None
    ids = tokenizer.get_vocab()
    tokens = {i: token for token, i in ids.items()}
    if not tokens.keys() >= {*needed, *used}:
        unknown = sorted({*needed, *used} - tokens.keys())
        raise ValueError(
            f"The tokenizer, of {len(tokens)} tokens, has no token {unknown[0]}, which is counted or needed. Tokenise "
            "the data with the tokenizer that the model was trained with, and give that one."
        )
    order: dict[int, None] = {}

    def add(wanted: Iterable[int]) -> None:
        for i in wanted:
            if i not in order:
                order.update(dict.fromkeys(ids[part] for part in (merges.ancestors(tokens[i]) if merges else ())))
                order[i] = None

    add(sorted(needed))
    first = len(order)
    add(used)
    return list(order), first


def _used(tokenizer: PreTrainedTokenizerBase, counts: NDArray[np.int64], min_count: int) -> list[int]:
    """Tokens that occur at least `min_count` times, most used first."""
    real = counts.copy()
    real[[i for i in tokenizer.all_special_ids if i < len(counts)]] = 0
    if min_count < 1 or real.max(initial=0) < min_count:
        raise ValueError(
            f"No token is used min_count={min_count} times: that many must be at least 1, and the most used token "
            f"occurs {real.max(initial=0)} times (special ones are not counted). Give texts as the model will read, in "
            "a language that its tokenizer knows, or a smaller min_count."
        )
    order = np.argsort(-real, kind="stable")
    return [int(i) for i in order if real[i] >= min_count]
