"""How often each token occurs, in texts of any size or in batches that are tokenised already.

Shapes: V token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from .backend import plain, size
from .reading import batched, strings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}  # of which ids some are padding
TOKEN_INPUTS = (*MASKS, "labels")


def count_tokens(texts: Any, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """How often each token occurs in texts, as they are tokenised without truncation and without special tokens: [V].

    `texts` is read as a stream (see `strings` for what it may be) and encoded in batches, on all cores unless
    TOKENIZERS_PARALLELISM says otherwise; memory does not grow with it.

    Raises:
        ValueError: a slow tokenizer, or texts that cannot be read; see `strings`.
    """
    counts = np.zeros(size(tokenizer), np.int64)
    with tqdm(desc="count tokens", unit=" tokens", unit_scale=True, leave=False) as progress:
        for batch in batched(strings(texts)):
            with plain(tokenizer) as encoder:
                encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int64)
            counts += np.bincount(ids, minlength=len(counts))
            progress.update(len(ids))
    return counts


def count_ids(
    batches: Iterable[Mapping[str, Any]], rows: int, inputs: Sequence[str] = TOKEN_INPUTS
) -> NDArray[np.int64]:
    """How often each of `rows` tokens occurs in batches for a model: [rows].

    Counted are those of `inputs` that a batch holds, where its attention mask is not 0 and the id is not negative (a
    label of -100). Name "labels" only for a model whose labels are tokens.

    Raises:
        ValueError: an id that the model has not.
    """
    counts = np.zeros(rows, np.int64)
    for batch in batches:
        for name in inputs:
            if batch.get(name) is not None:
                counts += _count(batch, name, rows)
    return counts


def _count(batch: Mapping[str, Any], name: str, rows: int) -> NDArray[np.int64]:
    ids = np.asarray(batch[name].cpu())
    mask = batch.get(MASKS.get(name, ""))
    real = (ids >= 0) if mask is None else (ids >= 0) & (np.asarray(mask.cpu()) != 0)
    found = np.bincount(ids[real], minlength=rows)
    if len(found) > rows:
        raise ValueError(
            f"{name} holds the token {len(found) - 1}, and the model has {rows}. Tokenise the data with the tokenizer "
            "that the model was trained with."
        )
    return found
