"""The families that are known: a row of data for each model type.

To add a family, add a row to the file of its kin, by one of the functions there where its modules have the names of a
known one, and a tiny config to `tests/tiny.py`; the tests of all families then run on it.
"""

from __future__ import annotations

from ..axes import Family
from .decoders import DECODERS
from .encoder_decoders import ENCODER_DECODERS
from .encoders import ENCODERS
from .multimodal import MULTIMODAL
from .speech import SPEECH
from .vision import VISION

EXAMPLE = "llama_like() in hf_prune/model/families/decoders.py"
ROWS = (*ENCODERS, *DECODERS, *ENCODER_DECODERS, *VISION, *SPEECH, *MULTIMODAL)
FAMILIES: dict[str, Family] = {row.model_type: row for row in ROWS}


def family_for(model_type: str) -> Family:
    """The row of a model type.

    Raises:
        ValueError: no row for it; the message lists the known families and says how to add one.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"hf_prune has no family row for model_type {model_type!r}. Known: {', '.join(sorted(FAMILIES))}. "
            f"To add one, describe its layers in a row like {EXAMPLE}."
        )
    return FAMILIES[model_type]


def registered(model_type: str) -> Family | None:
    """The hand-written or registered row of a model type; None: there is none."""
    return FAMILIES.get(model_type)
