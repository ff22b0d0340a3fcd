"""What the oracles say of a small instance of a model, unit by unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..model import prove
from ..model.axes import Family
from ..model.families import registered
from ..model.feed import feeds
from ..model.lookup import UNITS, Derivation
from ..model.sites import find_sites
from .families import differences
from .table import Row


def oracle_rows(model: Any, found: Derivation) -> list[Row]:
    """A row for what the config tells of each unit, and for each sublayer of the hand-written row, if there is one."""
    hand = registered(model.config.model_type)
    rows = [
        {
            "row": "derived",
            "units": unit,
            "sized by": ", ".join(found.proven.get(unit, ())) or "–",
            "in": "stock shapes",
        }
        | {"proven": "yes" if unit in found.proven else f"no: {found.reason(unit)}"}
        for unit in UNITS
    ]
    return rows + ([] if hand is None else [*_of_hand(model, hand), _agreement(model, hand, found)])


def _of_hand(model: Any, hand: Family) -> Iterator[Row]:
    subject = prove.Subject(model, feeds(model))
    for stack in hand.stacks:
        for row in stack.sublayers:
            alone = [replace(other, sublayers=(row,) if other is stack else ()) for other in hand.stacks]
            if not find_sites(model, replace(hand, stacks=tuple(alone))):  # of a stage, say, that this one has not
                continue
            reason = prove.per_layer(subject, alone)
            axes = " in ".join(axis.name for axis in reversed(row.axes))
            yield {
                "row": "hand",
                "units": f"{stack.name} {row.kind}: {axes}",
                "sized by": ", ".join(axis.config for axis in row.axes),
                "in": "other sizes in every layer",
                "proven": f"no: {reason}" if reason else "yes",
            }


def _agreement(model: Any, hand: Family, found: Derivation) -> Row:
    differs = differences(model, hand, found)
    return {"row": "both", "units": "all", "sized by": "", "in": "", "proven": "; ".join(differs) or "they agree"}
