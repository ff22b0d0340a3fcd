"""Whether a tokenizer is the model's own, as far as numbers can tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .backend import contents
from .renumbering import named_in_configs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE_ROWS, SPARE_SHARE = 1024, 0.1  # rows without a token that padding explains: at most the larger of both


def check_fits(tokenizer: PreTrainedTokenizerBase, rows: int, configs: Iterable[Any] = ()) -> None:
    """Raise ValueError where the vocabulary of a model with `rows` embeddings cannot be cut with this tokenizer.

    It is slow or a WordLevel one; a token has no row; far fewer tokens than rows (some rows of padding are common); or
    the model's `configs` name a row without a token.
    """
    contents(tokenizer)
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    another = "It is the tokenizer of another model: give the one that this model was trained with"
    if max(tokens) >= rows:
        raise ValueError(
            f"The tokenizer has the token {max(tokens)} ({tokens[max(tokens)]!r}), and the model's embedding {rows} "
            f"rows. {another}, or give its embedding the missing rows (model.resize_token_embeddings)."
        )
    if rows - len(tokens) > max(SPARE_ROWS, SPARE_SHARE * rows):
        raise ValueError(
            f"The tokenizer has {len(tokens)} tokens, and the model's embedding {rows} rows. {another}. If it is, drop "
            f"the rows without a token first: model.resize_token_embeddings({max(tokens) + 1})."
        )
    for path, named in named_in_configs(configs, rows).items():
        if not named <= tokens.keys():
            raise ValueError(
                f"{path} names {sorted(named - tokens.keys())}, and the tokenizer has no such token. {another}, or set "
                f"{path.rpartition('.')[2]} to tokens that it has."
            )
