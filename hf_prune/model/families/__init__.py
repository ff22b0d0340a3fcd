"""The families that are known: a row of data for each model type.

To add a family, add a row to the file of its kin, by one of the functions there where its modules have the names of a
known one, and a tiny config to `tests/tiny.py`; the tests of all families then run on it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

from ..axes import Family
from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .multimodal import MULTIMODAL
from .speech import SPEECH
from .vision import VISION

HOW_TO_ADD = (
    "To add one, describe its layers in a row like llama_like() in hf_prune/model/families/decoders.py and hand it to "
    "hf_prune.register_family; hf-prune check tells whether it is true."
)
GROUP = "hf_prune.families"  # of entry points, each a Family, several of them, or a function that gives them
ROWS = (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *VISION, *SPEECH, *MULTIMODAL)
FAMILIES: dict[str, Family] = {row.model_type: row for row in ROWS}


def family_for(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        ValueError: no row for it; the message lists the known families and says how to add one.
    """
    row = registered(model_type)
    if row is None:
        raise ValueError(
            f"hf_prune has no family row for model_type {model_type!r}. Known: {', '.join(sorted(FAMILIES))}. "
            f"{HOW_TO_ADD}"
        )
    return row


def registered(model_type: str) -> Family | None:
    """The hand-written or registered row of a model type; None: there is none."""
    if model_type not in FAMILIES:
        _load_entry_points()
    return FAMILIES.get(model_type)


def register_family(family: Family) -> None:
    """Add the row of a model type, so that its models can be cut; for this process.

    A package brings rows of its own by entry points of the group `hf_prune.families`.

    Raises:
        TypeError: no `Family` (see `hf_prune.model.axes`). ValueError: the model type has a row already.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family takes a hf_prune.model.axes.Family, got {type(family).__name__}.")
    if FAMILIES.get(family.model_type, family) != family:
        raise ValueError(f"{family.model_type!r} has a row already; a model type has one.")
    FAMILIES[family.model_type] = family


@cache
def _load_entry_points() -> None:
    for point in entry_points(group=GROUP):
        found = point.load()
        found = found() if callable(found) else found
        for family in [found] if isinstance(found, Family) else found:
            register_family(family)
