"""The statistics pass of a model: by which criterion, on which rows, and what it finds.

Shapes: B examples, T tokens, U units.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..model.batches import GUARD, Batch
from ..model.sites import Site
from ..plan import Where
from .checks import fit_labels
from .criteria import CRITERIA, Criterion, SiteStatistics
from .losses import has_head, has_loss, predicts_tokens
from .statistics import ALONE, Ranks, statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Scores:
    """What a pass over the rows has found, by site."""

    scores: dict[Where, torch.Tensor] = field(default_factory=dict)  # [U]
    gates: dict[Where, torch.Tensor] = field(default_factory=dict)  # of each example [B, U], where they are needed
    tokens: dict[Where, list[torch.Tensor]] = field(default_factory=dict)  # squared gradients [B*T], see `repair.solve`


def scored_rows(batches: Sequence[Batch]) -> list[Batch]:
    """All but those of another source, which only guard."""
    return [batch for batch in batches if (batch.held_out < GUARD).all()]


def scores_of(
    model: PreTrainedModel,
    sites: Sequence[Site],
    axes: Mapping[Where, str],
    batches: Sequence[Batch],
    criterion: Criterion,
    seed: int,
    ranks: Ranks = ALONE,
) -> Scores:
    """Score the units of every site along its axis.

    Raises:
        ValueError: scores or statistics that are no numbers, or that tell no unit from another.
    """
    result = Scores()
    for site, found in statistics(model, sites, axes, scored_rows(batches), criterion, seed, ranks):
        result.scores[site.key] = _score(site, criterion, found, model.dtype)
        if found.tokens is not None:
            result.tokens[site.key] = found.tokens
        if found.gate is not None:
            result.gates[site.key] = found.gate
    _check(result.scores, criterion)
    return result


def token_gradients(
    model: PreTrainedModel, sites: Sequence[Site], axes: Mapping[Where, str], batches: Sequence[Batch], name: str
) -> dict[Where, list[torch.Tensor]]:
    """Just what the repair weighs tokens by; nothing where the criterion of this name looks at no loss."""
    wanted = replace(CRITERIA[name], needs=("gradients",))
    passes = statistics(model, sites, axes, scored_rows(batches), wanted, 0)
    return {site.key: found.tokens for site, found in passes if found.tokens is not None}


def _score(site: Site, criterion: Criterion, found: SiteStatistics, dtype: torch.dtype) -> torch.Tensor:
    tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    if all(bool(value.isfinite().all()) for value in tensors):
        score = criterion.score(found)
        if torch.isfinite(score).all():
            return score
    raise ValueError(
        f"{site.name}: the statistics or the {criterion.name} score are NaN or infinite. Check the weights, the "
        f"calibration data and the dtype ({dtype}); float16 overflows where bfloat16 or float32 do not."
    )


def _check(scores: Mapping[Where, torch.Tensor], criterion: Criterion) -> None:
    """Raise ValueError where no site's scores tell one unit from another."""
    several = [score for score in scores.values() if len(score) > 1]
    if several and all(bool((score == score[0]).all()) for score in several):
        raise ValueError(
            f"All {criterion.name} scores are equal ({float(several[0][0]):.3g}): they tell no unit from another. "
            "Check that the model is trained and that labels and tokens are real, or use another criterion."
        )


def criterion_for(model: PreTrainedModel, batches: Sequence[Batch], asked: str | None) -> str:
    """The criterion asked for, or the one for this model and data; labels are fitted where it reads them."""
    rows = scored_rows(batches)
    loss = has_loss(model, rows)
    if asked is not None and CRITERIA[asked].needs_loss and not loss:
        raise ValueError(
            f"criterion={asked!r} needs a loss, and {type(model).__name__} with targets {sorted(rows[0].targets)} has "
            "none. Give labels and a model with a head, or use criterion='hessian' (or None, which picks it)."
        )
    if loss and (asked is None or CRITERIA[asked].needs_loss):
        fit_labels(model, rows)
    if asked is not None:
        return asked
    if loss:
        return "fisher_obs_root" if any(predicts_tokens(model, batch) for batch in rows) else "fisher_obs"
    if has_head(model):
        warnings.warn(
            f"No labels: what {type(model).__name__} predicts is not looked at, units are scored by 'hessian'. Give "
            "labels, or criterion='hessian' if that is meant.",
            stacklevel=4,
        )
    return "hessian"
