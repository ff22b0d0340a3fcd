"""A zero-shot choice task from running text: which of four continuations follows this context?

Chance is 25%. The wrong continuations come from elsewhere in the same text, start at a word and have as many tokens as
the right one, so that summed log-probabilities compare.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

CONTEXT, CONTINUATION, DISTRACTORS = 24, 12, 3
AWAY = 1000  # tokens between an item and where its wrong continuations come from


@dataclass(frozen=True)
class Item:
    """Token ids: a context, and its continuations, the right one first."""

    context: list[int]
    choices: list[list[int]]


def items(tokenizer: Any, text: str, count: int, seed: int = 0) -> list[Item]:
    """`count` items, taken evenly over a text; the same for every model and method."""
    ids = tokenizer(text)["input_ids"]
    draw = random.Random(seed)

    def word_start(position: int) -> int:
        while not tokenizer.decode([ids[position]]).startswith(" "):
            position += 1
        return position

    def elsewhere(start: int) -> int:
        while True:
            position = word_start(draw.randrange(len(ids) - AWAY))
            if abs(position - start) > AWAY:
                return position

    found = []
    for index in range(count):
        start = word_start(CONTEXT + index * (len(ids) - AWAY) // count)
        starts = [start, *(elsewhere(start) for _ in range(DISTRACTORS))]
        found.append(Item(ids[start - CONTEXT : start], [ids[at : at + CONTINUATION] for at in starts]))
    return found


@torch.inference_mode()
def correctness(model: Any, questions: list[Item], batch: int = 8) -> str:
    """One character an item: 1 where the right continuation has the highest summed log-probability, else 0."""
    right = ""
    for begin in range(0, len(questions), batch):
        some = questions[begin : begin + batch]
        ids = torch.tensor([item.context + choice for item in some for choice in item.choices], device=model.device)
        logits = model(ids, logits_to_keep=CONTINUATION + 1, use_cache=False).logits[:, :-1].float()
        target = ids[:, -CONTINUATION:, None]
        scores = logits.log_softmax(-1).gather(-1, target).sum((1, 2)).view(len(some), -1)
        right += "".join("01"[int(best == 0)] for best in scores.argmax(1))
    return right
