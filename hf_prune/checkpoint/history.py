"""What a pruned model remembers: its plan into the dense model, and the report of each cut.

The plan travels in the model's config, a bit for each unit, so that it survives a move, a stock save and the Hub. The
files beside the weights are for people and for cards: the plan in full, and the reports.
"""

from __future__ import annotations

import base64
import binascii
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json, write_text
from ..model.families import FAMILIES
from ..plan import AXIS_OF_FORMAT_1, Kept, PruningPlan
from .layout import HOME, KEY, entry_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.batches import Batch

PLAN_FILE = "pruning_plan.json"
REPORT_FILE = "pruning_report.json"
VOCABULARY = "vocabulary"  # the place of what is kept of it
PROOF_ROWS = 4  # calibration rows kept to prove that a saved model reloads
MEND = "Restore config.json, or delete both entries there to count from the model as it is."


@dataclass
class History:
    """What a pruned model in memory remembers: its plan into the dense model, rows to prove a save with, each cut."""

    plan: PruningPlan
    batch: Batch | None
    cuts: tuple[dict[str, Any], ...] = ()  # the report of each prune()
    processing_class: Any = None  # the tokenizer of a shortened vocabulary

    def save(self, directory: Path) -> None:
        """The plan and the reports, beside the weights."""
        self.plan.save(directory / PLAN_FILE)
        report = {"format": 1, "plan": self.plan.hash, "cuts": self.cuts}
        write_text(directory / REPORT_FILE, json.dumps(report, indent=1) + "\n")

    @classmethod
    def load(cls, directory: Path) -> History | None:
        """What `save` wrote; None where there is no plan."""
        if not (directory / PLAN_FILE).is_file():
            return None
        plan = PruningPlan.load(directory / PLAN_FILE)
        return cls(plan, None, _cuts(directory / REPORT_FILE, plan))


def history_of(model: PreTrainedModel) -> History | None:
    """What an earlier prune() left: in this process, or in the config that the model was loaded with.

    Raises:
        ValueError: the config's plan is damaged, or of a version to come.
    """
    if not hasattr(model, "_hf_prune") and model.config.__dict__.get(KEY):
        model._hf_prune = _read(model)  # type: ignore[assignment]
    return getattr(model, "_hf_prune", None)


def _read(model: PreTrainedModel) -> History | None:
    entry, home = entry_of(model.config), model.__dict__.get(HOME)
    name = str(entry.get("plan") or "")
    if not name:
        return None
    model_type = model.config.model_type
    plan = _beside(_file(home, model.config, PLAN_FILE), name, model_type) or _carried(model_type, entry, name)
    if plan is None:
        warnings.warn(
            f"This model was cut by the plan {name[:12]}, which is neither in its config nor beside its weights: what "
            "is planned now counts from the model as it is.",
            stacklevel=4,
        )
        return None
    return History(plan, None, _cuts(_file(home, model.config, REPORT_FILE), plan))


def _carried(model_type: str, entry: Mapping[str, Any], name: str) -> PruningPlan | None:
    """The plan in a config."""
    if "kept" not in entry:  # an early hf_prune wrote it
        return None
    plan = unpack(model_type, entry["kept"])
    if not plan.is_named(name):
        raise ValueError(
            f"The config's hf_prune.kept is the plan {plan.hash[:12]}, its hf_prune.plan says {name[:12]}: one of them "
            f"was edited. {MEND}"
        )
    return replace(plan, cost={key: entry[key] for key in ("before", "after") if key in entry})


def is_of(plan: PruningPlan, name: str, model_type: str) -> bool:
    """Whether a plan is the one of this hash, made for this family or for one whose weights are saved as this one."""
    door = FAMILIES[plan.model_type].as_model_type if plan.model_type in FAMILIES else None
    return plan.is_named(name) and model_type in (plan.model_type, door)


def _beside(path: Path | None, name: str, model_type: str) -> PruningPlan | None:
    """The plan in full, from beside the weights, where that is the one that cut them."""
    if path is None:
        return None
    try:
        plan = PruningPlan.load(path)
    except ValueError as error:
        warnings.warn(f"{error} The plan in the model's config is used.", stacklevel=5)
        return None
    if is_of(plan, name, model_type):
        return replace(plan, model_type=model_type)  # a Llama saved as Mistral is one
    warnings.warn(
        f"{path} is another plan ({plan.hash[:12]}, of a {plan.model_type}) than the one that cut this {model_type} "
        f"({name[:12]}), and is not used.",
        stacklevel=5,
    )
    return None


def _file(home: str | None, config: Any, name: str) -> Path | None:
    """A file beside the weights: in the directory that they came from, or in the Hub's cache of their repository."""
    origin = str(config._name_or_path)
    path = Path(home or origin, name)
    if path.is_file():
        return path
    if home or not origin:  # a directory that is gone, and never a repository
        return None
    from transformers.utils import cached_file

    quiet = ("gated_repo", "missing_entries", "connection_errors")
    options: dict[str, Any] = {f"_raise_exceptions_for_{what}": False for what in quiet}
    try:
        found = cached_file(origin, name, revision=getattr(config, "_commit_hash", None), **options)
    except (OSError, ValueError):  # no name of a repository
        return None
    return Path(found) if found else None


def _cuts(path: Path | None, plan: PruningPlan) -> tuple[dict[str, Any], ...]:
    """The reports of the cuts that made up a plan; none where the file is missing, damaged, or of another plan."""
    if path is None or not path.is_file():
        return ()
    try:
        found = read_json(path)
    except ValueError as error:
        warnings.warn(f"{error} The reports of earlier cuts are left out.", stacklevel=5)
        return ()
    name, cuts = str(found.get("plan")), found.get("cuts")
    if plan.is_named(name) and isinstance(cuts, list) and all(isinstance(cut, dict) for cut in cuts):
        return tuple(cuts)
    warnings.warn(
        f"{path} belongs to another plan ({name[:12]}) than this model ({plan.hash[:12]}), or was edited, and is left "
        "out.",
        stacklevel=5,
    )
    return ()


# --- what a cut adds -------------------------------------------------------------------------------------------------


def summary_of(model: PreTrainedModel, report: Mapping[str, Any], composed: PruningPlan) -> dict[str, Any]:
    """What the config says of a cut beside the sizes: where the model comes from, and all that was kept of it."""
    previous = model.config.__dict__.get(KEY, {})
    origin = {key: previous[key] for key in ("base_model", "license") if previous.get(key)}
    return {
        "version": version("hf-prune"),
        **(origin or _origin(str(model.config._name_or_path))),
        "criterion": report["criterion"],
        "repair": report["repair"],
        "before": previous.get("before") or report["before"],
        "after": report["after"],
        "plan": composed.hash,
        "kept": pack(composed),
    }


def _origin(name: str) -> dict[str, str]:
    """Of a Hub id that id; of a directory its name, and the licence that its README.md states."""
    from huggingface_hub import ModelCard

    home = Path(name)
    if not name or not home.is_dir():
        return {"base_model": name}
    card = home / "README.md"
    licence = ModelCard.load(str(card), ignore_metadata_errors=True).data.license if card.is_file() else None
    return {"base_model": home.resolve().name, **({"license": str(licence)} if licence else {})}


def proof_rows(batches: Sequence[Batch]) -> Batch | None:
    """A few rows to prove with that a saved model reloads."""
    if not batches:
        return None
    first = batches[0]
    inputs = {key: value[:PROOF_ROWS] for key, value in first.inputs.items()}
    return replace(first, inputs=inputs, targets={}, held_out=first.held_out[:PROOF_ROWS])


# --- a plan in a config ----------------------------------------------------------------------------------------------


def pack(plan: PruningPlan) -> dict[str, str]:
    """A line a place: axis, how many units there were, and the kept ones as bits (base64, the first the lowest bit)."""
    return {
        ".".join(map(str, kept.where)) or VOCABULARY: f"{kept.axis} {kept.of} {_bits(kept.of, kept.kept)}"
        for kept in plan.kept
    }


def _bits(of: int, kept: tuple[int, ...]) -> str:
    raw = bytearray((of + 7) // 8)
    for unit in kept:
        raw[unit // 8] |= 1 << unit % 8
    return base64.b64encode(raw).decode()


def unpack(model_type: str, packed: Mapping[str, str]) -> PruningPlan:
    """What `pack` was given, also in the words of format 1.

    Raises:
        ValueError: something else.

    >>> plan = PruningPlan("bert", (Kept(("encoder", 3, "ffn"), "neurons", 12, (0, 2, 11)),))
    >>> pack(plan)
    {'encoder.3.ffn': 'neurons 12 BQg='}
    >>> unpack("bert", pack(plan)) == plan
    True
    """
    try:
        return PruningPlan(model_type, tuple(_kept(key, value) for key, value in packed.items()))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"The config's hf_prune.kept is no plan ({error}): it was edited or damaged. {MEND}"
        ) from error


def _kept(key: str, value: str) -> Kept:
    words, (axis, of, bits) = () if key == VOCABULARY else key.split("."), value.split(" ")
    try:
        raw = base64.b64decode(bits, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{key}: {error}") from error
    if len(raw) != (int(of) + 7) // 8:
        raise ValueError(f"{key}: bits of {8 * len(raw)} units, not of {of}")
    kept = tuple(8 * at + bit for at, byte in enumerate(raw) if byte for bit in range(8) if byte >> bit & 1)
    where = tuple(int(word) if at == 1 else word for at, word in enumerate(words))
    return Kept(where, AXIS_OF_FORMAT_1.get(axis, axis), int(of), kept)
