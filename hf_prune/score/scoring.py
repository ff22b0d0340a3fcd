"""The statistics pass of a model: by which criterion, on which rows, and what it finds.

Shapes: B examples, T tokens, U units.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from ..model.batches import GUARD, Batch
from ..model.sites import Site
from ..plan import Where
from .checks import fit_labels
from .criteria import CRITERIA, Criterion, SiteStatistics, given
from .experts import FEW, where_few
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
    result, few = Scores(), {}
    for site, found in statistics(model, sites, axes, scored_rows(batches), criterion, seed, ranks):
        scores = [_score(site, criterion, each, model.dtype) for each in found]
        result.scores[site.key], few[site.name] = where_few(scores, found)
        if found[0].tokens is not None:
            result.tokens[site.key] = found[0].tokens
        if found[0].gate is not None:
            result.gates[site.key] = torch.cat([given(each.gate) for each in found], 1)
    _warn_of_few(few)
    _check(result.scores, criterion)
    return result


def _warn_of_few(experts: Mapping[str, Sequence[int]]) -> None:
    """Say which experts see too few tokens to be judged by them."""
    places = {name: numbers for name, numbers in experts.items() if numbers}
    if places:
        first, numbers = next(iter(places.items()))
        warnings.warn(
            f"{sum(map(len, places.values()))} experts in {len(places)} layers see fewer than {FEW} calibration tokens "
            f"({first}: {', '.join(map(str, numbers[:8]))}): they count as hardly needed, and their neurons by "
            "magnitude. Give more examples, and of all kinds that the model is used on.",
            stacklevel=4,
        )


def token_gradients(
    model: PreTrainedModel, sites: Sequence[Site], axes: Mapping[Where, str], batches: Sequence[Batch], name: str
) -> dict[Where, list[torch.Tensor]]:
    """Just what the repair weighs tokens by; nothing where the criterion of this name looks at no loss."""
    wanted = replace(CRITERIA[name], needs=("gradients",))
    passes = statistics(model, sites, axes, scored_rows(batches), wanted, 0)
    return {site.key: found[0].tokens for site, found in passes if found[0].tokens is not None}


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


def criterion_for(
    model: PreTrainedModel, batches: Sequence[Batch], asked: str | None, axes: Collection[str] = ()
) -> str:
    """The criterion asked for, or the one for this model and data; labels are fitted where it reads them.

    Args:
        axes: those whose units may go.

    Raises:
        ValueError: a criterion that needs a loss where there is none, or that is made for other units.
    """
    if asked is None and {*axes} == {"experts"}:
        return "reap"
    made_for = CRITERIA[asked].of if asked is not None else ""
    if made_for and (others := sorted({*axes} - {made_for})):
        raise ValueError(
            f"criterion={asked!r} scores {made_for} alone, and {', '.join(others)} may go too. Take "
            f"units=[{made_for!r}], or a criterion for all units (None picks one)."
        )
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
