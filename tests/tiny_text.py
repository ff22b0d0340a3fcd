"""Tiny checkpoints with tokenizers, and files of words, for the tests of the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
WORDS = [f"w{i}" for i in range(94)]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def tokenizer(chat_template: str | None = None) -> Any:
    """99 words, the vocabulary of the tiny models."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", model_max_length=64, **names)
    fast.chat_template = chat_template
    return fast


def checkpoint(directory: Path, family: str, class_name: str | None = None, **changes: Any) -> str:
    """A tiny model of a family saved with a tokenizer; returns the directory."""
    tiny.tiny_model(family, class_name, **changes).save_pretrained(directory)
    tokenizer(CHAT).save_pretrained(directory)
    return str(directory)


def sentences(count: int, words: int = 12, seed: int = 0) -> list[str]:
    """Random sentences of half to all of `words` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(words // 2, words))) for _ in range(count)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(path: Path, count: int = 120, labels: tuple[Any, ...] = (0, 1), column: str = "label") -> str:
    rows = [{"text": text, column: labels[i % len(labels)]} for i, text in enumerate(sentences(count))]
    return write_jsonl(path, rows)
