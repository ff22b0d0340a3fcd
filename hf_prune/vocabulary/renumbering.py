"""Token ids in a model's config and generation config: found by the names of their keys, and rewritten."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from .backend import ids_in, with_ids

IDS = re.compile(  # pad_token_id, image_token_index, Whisper's lang_to_id, XLM's pad_index, ...
    r".*_tokens?_(id|ids|index|indices|idx)|(bos|eos|pad|unk|mask)_index|(lang|task)_to_id|force_words_ids"
)
FORBIDDING = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")  # moot for a removed token
PLACED = "forced_decoder_ids"  # pairs of a position and an id
SIZE = re.compile(r"(?!.*type_vocab).*vocab_size.*|n_words")


class Entry(NamedTuple):
    """A value in a config: what holds it, its key there, and the dotted path to it."""

    holder: Any
    key: str
    value: Any
    path: str

    def ids(self, rows: int) -> set[int]:
        """The rows that it names; negative ids and those from `rows` on name none."""
        value = [i for _, i in self.value] if self.key == PLACED else self.value
        return set() if SIZE.fullmatch(self.key) else {i for i in ids_in(value, is_id=True) if 0 <= i < rows}


def named_in_configs(configs: Iterable[Any], rows: int) -> dict[str, set[int]]:
    """The tokens that configs need, by dotted key: all that they name, but for those that must not be generated."""
    entries = (entry for config in configs for entry in _entries(config, rows, type(config).__name__))
    return {entry.path: entry.ids(rows) for entry in entries if entry.key not in FORBIDDING and entry.ids(rows)}


def renumber_(configs: Iterable[Any], mapping: Mapping[int, int], rows: int) -> None:
    """Write new ids, and the new vocab_size, into configs (a model's, its generation config), nested ones included.

    `mapping` is {old id: new id} of the kept tokens, `rows` the rows that the embedding had. An id is what lies under a
    key that IDS, FORBIDDING or PLACED names; negative ones, and those from `rows` on, name no row and stay as they are.
    Of lists of what must not be generated, entries with a removed token are dropped. A nested config with a vocabulary
    of another size (audio codes) keeps its ids.

    Raises:
        ValueError: a config names a removed token; nothing has been changed then.
    """
    entries = [entry for config in configs for entry in _entries(config, rows, type(config).__name__)]
    for entry, value in [(entry, _renumbered(entry, mapping, rows)) for entry in entries]:
        if isinstance(entry.holder, dict):
            entry.holder[entry.key] = value
        else:
            setattr(entry.holder, entry.key, value)


def _entries(config: Any, rows: int, path: str) -> Iterator[Entry]:
    """All that holds ids of this vocabulary, or its size."""
    for key, value in _items(config).items():
        entry = Entry(config, str(key), value, f"{path}.{key}")
        if _is_entry(entry, rows):
            yield entry
        elif (isinstance(value, dict) or hasattr(value, "to_dict")) and _items(value).get("vocab_size", rows) == rows:
            yield from _entries(value, rows, entry.path)


def _items(config: Any) -> dict[Any, Any]:
    items = config if isinstance(config, dict) else vars(config)
    return {key: value for key, value in items.items() if not str(key).startswith("_")}


def _is_entry(entry: Entry, rows: int) -> bool:
    if SIZE.fullmatch(entry.key):
        return bool(entry.value == rows)
    is_named = entry.key in (*FORBIDDING, PLACED) or IDS.fullmatch(entry.key) is not None
    return is_named and entry.value is not None


def _renumbered(entry: Entry, mapping: Mapping[int, int], rows: int) -> Any:
    def new(i: int) -> int:
        return mapping[i] if 0 <= i < rows else i

    if SIZE.fullmatch(entry.key):
        return len(mapping)
    if entry.key in FORBIDDING:
        items = [[list(k), v] for k, v in entry.value.items()] if isinstance(entry.value, dict) else entry.value
        left = [item for item in items if entry._replace(value=item).ids(rows) <= mapping.keys()]
        return with_ids(left, new, is_id=True) or None  # transformers refuses an empty list
    removed = sorted(entry.ids(rows) - mapping.keys())
    if removed:
        raise ValueError(
            f"{entry.path} is {entry.value!r}, and of these tokens {removed} would be removed. Keep them (`protected` "
            "names what configs need), or set it to tokens that stay."
        )
    if entry.key == PLACED:
        return [[position, with_ids(i, new, is_id=True)] for position, i in entry.value]
    return with_ids(entry.value, new, is_id=True)
