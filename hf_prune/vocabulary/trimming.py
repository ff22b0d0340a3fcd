"""A tokenizer of fewer tokens, through the tokenizers library's own JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .alphabet import alphabet
from .backend import contents, model_vocabulary, named_ids, outside_vocabulary, with_ids
from .merges import kept_merges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = ("padding_side", "truncation_side", "clean_up_tokenization_spaces")  # set by hand, they are not saved
FILE = "tokenizer.json"


def trimmed(tokenizer: PreTrainedTokenizerBase, kept: Collection[int]) -> PreTrainedTokenizerBase:
    """The same tokenizer with the tokens `kept` only, numbered from 0 in the order of their old ids.

    `tokenizer` stays as it is. The result is what `from_pretrained` makes of the saved files, so that it can be saved
    and opened again; of the same class, or, where that class would build another tokenizer from them, a
    PreTrainedTokenizerFast.

    Raises:
        ValueError: a slow tokenizer or one of whole words; `kept` has ids that it has not, or lacks some that its own
            files name.
    """
    spec = contents(tokenizer)
    _check_kept(tokenizer, spec, {*kept})
    wanted = _trimmed_contents(spec, {old: new for new, old in enumerate(sorted({*kept}))})
    with TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        Path(directory, FILE).write_text(json.dumps(wanted, ensure_ascii=False), encoding="utf-8")
        result = _opened(tokenizer, directory, wanted)
    result.name_or_path = result.init_kwargs["name_or_path"] = tokenizer.name_or_path
    return result


def _opened(tokenizer: PreTrainedTokenizerBase, directory: str, wanted: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """By its own class if that gives what the file says: some classes fix the place of a token, or their processors."""
    from transformers import PreTrainedTokenizerFast

    settings = {name: getattr(tokenizer, name) for name in SETTINGS}
    for opener in (type(tokenizer), PreTrainedTokenizerFast):
        result = opener.from_pretrained(directory, **settings)
        if _is_as_wanted(contents(result), wanted):
            return result
    raise RuntimeError(f"A {type(tokenizer).__name__} cannot be opened from the trimmed {FILE}. Nothing was changed.")


def _is_as_wanted(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """But for tokens of the vocabulary that were only named as special before: opening makes added tokens of them."""
    old, new = wanted["added_tokens"], found["added_tokens"]
    more = {token["content"] for token in new if token not in old}
    if any(token not in new for token in old) or not model_vocabulary(wanted["model"]).keys() >= more:
        return False
    return _without_tokens(found) == _without_tokens(wanted)


def _without_tokens(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    """All but added tokens, and the scores of a Unigram model, which the library does not read to the last bit."""
    rest = {**outside_vocabulary(spec), "added_tokens": None}
    return rest, model_vocabulary(spec["model"]), spec["model"].get("merges")


def _trimmed_contents(spec: Mapping[str, Any], mapping: Mapping[int, int]) -> dict[str, Any]:
    """The JSON with only the tokens of `mapping`, and their new ids."""
    rest: dict[str, Any] = with_ids(outside_vocabulary(spec), mapping.__getitem__)
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, list):
        rest["model"]["vocab"] = [row for i, row in enumerate(vocabulary) if i in mapping]
        return rest
    rest["model"]["vocab"] = {token: mapping[i] for token, i in vocabulary.items() if i in mapping}
    if "merges" in spec["model"]:
        rest["model"]["merges"] = kept_merges(spec["model"], rest["model"]["vocab"])
    return rest


def _check_kept(tokenizer: PreTrainedTokenizerBase, spec: Mapping[str, Any], kept: set[int]) -> None:
    known = {*tokenizer.get_vocab().values()}
    if not kept <= known:
        raise ValueError(
            f"{len(kept - known)} of the ids to keep are no tokens of the tokenizer, {min(kept - known)} first; it has "
            f"{len(known)}, up to {max(known)}. Give its own ids."
        )
    lost = sorted((named_ids(spec) | alphabet(spec["model"])) - kept)
    if lost:
        raise ValueError(
            f"{len(lost)} tokens cannot go, {tokenizer.convert_ids_to_tokens(lost[0])!r} ({lost[0]}) first: added and "
            "special ones, and those that any text is spelled with. Keep them (`protected` names them all)."
        )
