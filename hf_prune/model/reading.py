"""What the effects of a config's keys say about a model: the common ground of what is derived from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .effects import Effect, Snapshot

Entry = tuple[str, int]  # (tensor of a layer, dimension)
Layers = dict[int, dict[str, list[Entry]]]  # layer -> key -> what it sizes there
Places = dict[tuple[str, int], list[Entry]]  # (stack, layer) -> what is sized there


class Unknown(ValueError):
    """Units that lie in a way that no row can say, and why."""


@dataclass
class Reading:
    """What the effects of a config's keys say about a model."""

    model: nn.Module  # on the meta device
    snapshot: Snapshot
    effects: Sequence[Effect]
    added: Sequence[str] = ()  # keys that were said aloud
    numbers: Mapping[str, int] = field(default_factory=dict)  # all sizes in the config, by key
    prefix: str = ""  # of the paths of stacks, which are relative to the base model
    refused: dict[str, list[str]] = field(default_factory=dict)  # units -> reasons

    def effect(self, key: str) -> Effect:
        return next(effect for effect in self.effects if effect.key == key)

    def refuse(self, word: str, reason: object) -> None:
        self.refused.setdefault(word, []).append(str(reason))


def is_under(tensor: str, root: str) -> bool:
    return not root or tensor.startswith(f"{root}.")
