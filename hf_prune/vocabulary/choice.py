"""The vocabulary of a model as a choice: a tokenizer, how often its tokens are used, and which of them may go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import PruningConfig
from ..model.anatomy import describe
from ..model.batches import Batch
from ..model.configs import configs_of
from ..model.embeddings import counted_from
from ..model.probe import positions
from .choosing import chosen, protected
from .counting import MASKS, TOKEN_INPUTS, count_ids, count_tokens
from .fitting import check_fits
from .proof import prove_texts
from .rows import batch_translator
from .trimming import trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 1000  # texts of a stream that can be read only once, kept for the proof
LEVELS = (2, 3, 5, 10, 20, 50, 100)  # times `min_count`: how often the tokens of smaller vocabularies are used


@dataclass(frozen=True)
class Vocabulary:
    """What `PruningConfig(units=[..., "tokens"])` chooses from."""

    tokenizer: PreTrainedTokenizerBase
    counts: NDArray[np.int64]  # of each token in the texts, [V]
    needed: frozenset[int]  # cannot go
    texts: Any  # for the proof
    min_count: int = 1
    most: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: Any, texts: Any, data: Any, config: PruningConfig) -> Vocabulary:
        """Count the tokens of `texts` (None: of all batches or rows of `data`) for a model.

        Raises:
            ValueError: no fast tokenizer, that of another model, texts that use no token, or a model that reads none.
        """
        anatomy = describe(model)
        extent = next((extent for extent in anatomy.extents if extent.where == ()), None)
        if extent is None:
            why = dict(anatomy.family.refused).get("tokens", "it reads no tokens")
            raise ValueError(
                f"units=['tokens']: a {model.config.model_type} has no vocabulary that can go: {why}. Name other units."
            )
        if tokenizer is None:
            raise ValueError(
                "units=['tokens']: the vocabulary is cut with its tokenizer. Give processing_class=tokenizer."
            )
        configs = token_configs(model)
        check_fits(tokenizer, extent.of, configs)
        is_lm = model.get_output_embeddings() is not None
        if texts is None:
            inputs = TOKEN_INPUTS if is_lm else TOKEN_INPUTS[:-1]
            texts, counts = (), count_ids(_batches(data), extent.of, inputs)[: len(tokenizer)]
        else:
            texts, sample = _sampled(texts)
            texts, counts = sample, count_tokens(texts, tokenizer)
        needed = frozenset({*protected(tokenizer, configs), *counted_from(model, extent)})
        return cls(tokenizer, counts, needed, texts, config.min_count, config.max_tokens)

    def kept(self, times: int = 1) -> tuple[int, ...]:
        """The tokens that stay where those do that are used `times * min_count` times."""
        return chosen(self.tokenizer, self.counts, self.needed, self.min_count * times, self.most)

    def levels(self) -> list[tuple[int, ...]]:
        """Ever smaller vocabularies."""
        found = [self.kept()]
        for times in LEVELS:
            if self.counts.max() >= times * self.min_count and len(kept := self.kept(times)) < len(found[-1]):
                found.append(kept)
        return found

    def lost(self, kept: Sequence[int]) -> float:
        """The share of the texts' tokens that are none of these."""
        return 1.0 - float(self.counts[list(kept)].sum() / max(self.counts.sum(), 1))

    def proven(self, kept: Sequence[int]) -> PreTrainedTokenizerBase:
        """The tokenizer of what is kept.

        Raises:
            RuntimeError: a text of kept tokens is tokenised otherwise than before.
        """
        after = trimmed(self.tokenizer, kept)
        prove_texts(self.tokenizer, after, kept, self.texts)
        return after


def token_configs(model: Any) -> list[Any]:
    """All configs of a model that hold token ids."""
    return [*configs_of(model), *filter(None, [getattr(model, "generation_config", None)])]


def translation(
    tokenizer: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, model: PreTrainedModel
) -> Callable[[Batch], Batch]:
    """Batches of a model in the tokens of its trimmed tokenizer."""
    return batch_translator(tokenizer, after, model.get_output_embeddings() is not None, positions(model))


def _batches(data: Any) -> Iterable[Mapping[str, Any]]:
    """Batches, or a dataset's rows as batches of one."""
    if not hasattr(data, "column_names"):
        return data
    names = [name for name in (*TOKEN_INPUTS, *MASKS.values()) if name in data.column_names]
    return ({name: torch.tensor([ids]) for name, ids in row.items()} for row in data.select_columns(names))


def _sampled(texts: Any) -> tuple[Any, Any]:
    """Texts to count, and texts for the proof: the same, or of a stream that can be read once its beginning."""
    if not isinstance(texts, Iterator):
        return texts, texts
    kept = list(itertools.islice(texts, SAMPLE))
    return itertools.chain(kept, texts), kept
