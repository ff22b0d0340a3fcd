"""A fast tokenizer as the tokenizers library writes it in tokenizer.json, and where token ids lie in that JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELS = ("BPE", "WordPiece", "Unigram")
ID_KEYS = {"id", "ids", "pad_id", "unk_id", "sep", "cls"}  # what holds ids in tokenizer.json, outside of the vocabulary
VOCABULARY_KEYS = {"vocab", "merges"}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # the tokens of a byte_fallback
SPACE = "▁"  # stands for a space in SentencePiece vocabularies


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The tokenizers library's object behind a fast tokenizer.

    Raises:
        ValueError: a slow tokenizer, or none.
    """
    found = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(found, Tokenizer):
        return found
    raise ValueError(
        f"The vocabulary can be cut through a fast tokenizer only; {type(tokenizer).__name__} is none. Give the fast "
        "form (transformers.AutoTokenizer opens it where there is a tokenizer.json; of a processor, "
        "processor.tokenizer), or leave tokens out of the units."
    )


def contents(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json would hold.

    Raises:
        ValueError: a slow tokenizer, or a model whose tokens have no smaller pieces (WordLevel).
    """
    found: dict[str, Any] = json.loads(backend(tokenizer).to_str())
    if found["model"]["type"] not in MODELS:
        raise ValueError(
            f"A {found['model']['type']} tokenizer cannot lose tokens: a dropped word has no smaller pieces. Those of "
            f"{', '.join(MODELS)} can. Leave tokens out of the units."
        )
    return found


@contextlib.contextmanager
def plain(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """The backend, which neither truncates nor pads meanwhile.

    It is no copy: copies go through JSON, where the scores of a Unigram model lose their last bit.
    """
    found = backend(tokenizer)
    truncation, padding = found.truncation, found.padding
    found.no_truncation()
    found.no_padding()
    try:
        yield found
    finally:
        if truncation is not None:
            found.enable_truncation(**truncation)
        if padding is not None:
            found.enable_padding(**padding)


def size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding of the tokenizer needs: the largest id and one."""
    return max(tokenizer.get_vocab().values()) + 1


def model_vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of the JSON's model with their ids; added tokens may have further ones."""
    vocabulary = model["vocab"]
    return dict(vocabulary) if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}


def symbols(token: str, model: Mapping[str, Any]) -> list[str]:
    """The single characters that spell a token, each as the model writes it at that place of a word.

    >>> symbols("##ing", {"continuing_subword_prefix": "##"})
    ['##i', '##n', '##g']
    """
    prefix, suffix = (model.get(key) or "" for key in ("continuing_subword_prefix", "end_of_word_suffix"))
    end = suffix if suffix and token.endswith(suffix) and token != suffix else ""
    rest = token.removesuffix(end)
    start = prefix if prefix and rest.startswith(prefix) and rest != prefix else ""
    characters = list(rest.removeprefix(start))
    spelled = [start + characters[0], *(prefix + character for character in characters[1:])] if characters else []
    return [*spelled[:-1], spelled[-1] + end] if spelled else []


def outside_vocabulary(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON without its model's vocabulary and merges."""
    model = {key: value for key, value in spec["model"].items() if key not in VOCABULARY_KEYS}
    return {**spec, "model": model}


def with_ids(value: Any, new: Callable[[int], int], is_id: bool = False) -> Any:
    """A JSON value with `new(id)` for each id: every whole number under one of ID_KEYS, or anywhere if `is_id`."""
    if isinstance(value, dict):
        return {key: with_ids(inner, new, is_id or key in ID_KEYS) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_ids(inner, new, is_id) for inner in value)
    return new(value) if is_id and isinstance(value, int) and not isinstance(value, bool) else value


def named_ids(spec: Mapping[str, Any]) -> set[int]:
    """Ids that the JSON names outside of the vocabulary: added tokens, post-processor, padding, unknown token."""
    unknown = model_vocabulary(spec["model"]).get(spec["model"].get("unk_token"))
    return {*ids_in(outside_vocabulary(spec)), *([] if unknown is None else [unknown])}


def ids_in(value: Any, is_id: bool = False) -> set[int]:
    """All ids that `with_ids` would replace."""
    found: set[int] = set()

    def note(i: int) -> int:
        found.add(i)
        return i

    with_ids(value, note, is_id)
    return found
