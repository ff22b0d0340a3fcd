"""The row of any model: a hand-written or registered one, else one that is derived from its config and proven.

What is proven is remembered for the class and its config, as long as the process lives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import derive, prove
from .axes import Axis, Family, Stack, Stock, Sublayer
from .configs import raw
from .effects import Effect, Snapshot, changed, effects, explicit, sizes
from .families import HOW_TO_ADD, registered
from .feed import feeds
from .instance import build, instance, quiet, randomize_
from .reading import Reading
from .sites import find_sites
from .tokens import token_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPECTED = ("neurons", "heads", "layers", "tokens")  # of any model
BY_HAND = ("channels", "hidden")  # shapes do not say where norms and sums stand
UNITS = ("neurons", "heads", "experts", "width of experts", *BY_HAND, "layers", "tokens")  # KV groups go with heads


def unit_word(axis: Axis) -> str:
    """What the tables call an axis of a sublayer."""
    return "width of experts" if axis.each else {"kv_groups": "heads"}.get(axis.name, axis.name)


_KNOWN: dict[tuple[type, str], Family] = {}


def family_of(model: PreTrainedModel) -> Family:
    """The row of a model.

    Raises:
        ValueError: there is none, and none can be derived; the message says why and how to add one.
    """
    row = registered(model.config.model_type)
    return row if row is not None else _fitting(model, derived(type(model), model.config))


def _fitting(model: Any, family: Family) -> Family:
    """What of a derived row is true of the whole model too: its sizes are those that the keys say."""
    wrong: list[tuple[str, str]] = []
    stacks = []
    for stack in family.stacks:
        misfits = [
            _misfit(model, replace(family, stacks=(replace(stack, sublayers=(row,)),))) for row in stack.sublayers
        ]
        fits = [row for row, reason in zip(stack.sublayers, misfits, strict=True) if not reason]
        lost = [(row, reason) for row, reason in zip(stack.sublayers, misfits, strict=True) if reason]
        wrong += [(row.axes[-1].name, reason) for row, reason in lost]
        fits = [_mute(row, {axis.config for other, _ in lost for axis in other.axes}) for row in fits]
        stacks.append(replace(stack, sublayers=tuple(fits)))
    return replace(family, stacks=tuple(stacks), refused=(*wrong, *family.refused))


def _mute(row: Sublayer, keys: set[str]) -> Sublayer:
    """The row whose axes these keys cannot say, as they size something else that does not go."""
    return replace(row, axes=tuple(replace(a, stock="none") if a.config in keys else a for a in row.axes))


def _misfit(model: Any, family: Family) -> str:
    """Why a row of one sublayer is not true of a model; "" where it is."""
    try:
        sites = find_sites(model, family)
    except ValueError as error:
        return str(error)
    for site in sites:
        for axis in site.row.axes:
            said = raw(model.config, axis.config)
            if said not in (None, site.values[axis.config]):
                return f"{site.name} has {site.values[axis.config]} {axis.name} where {axis.config} is {said}"
    return ""


def derived(cls: type, config: Any) -> Family:
    """The row that a class and a config tell by themselves, proven on a small instance.

    Raises:
        ValueError: no small instance runs, or nothing is proven.
    """
    no_row = f"hf_prune has no family row for model_type {config.model_type!r}, and none could be derived"
    known = {name: value for name, value in config.to_dict().items() if name not in ("hf_prune", "_name_or_path")}
    key = (cls, json.dumps(known, sort_keys=True, default=str))
    try:
        if key not in _KNOWN:
            with quiet():
                _KNOWN[key] = derivation(instance(config, cls)).family
    except ValueError as error:
        raise ValueError(f"{no_row}: {error}. {HOW_TO_ADD}") from error
    found = _KNOWN[key]
    if not found.stacks and found.tokens is None:
        reasons = "; ".join(f"{unit}: {reason}" for unit, reason in found.refused)
        raise ValueError(f"{no_row}: nothing is proven ({reasons or 'no key sizes a list of layers'}). {HOW_TO_ADD}")
    return found


@dataclass
class Derivation:
    """What was found of a model: the row, and why each other unit is not in it."""

    family: Family
    class_name: str
    proven: dict[str, list[str]] = field(default_factory=dict)  # units -> keys that size them
    refused: dict[str, list[str]] = field(default_factory=dict)  # units -> reasons

    def reason(self, unit: str) -> str:
        """Why units are not proven."""
        none = "rows by hand alone say them" if unit in BY_HAND else "no key of its config sizes them alone"
        return "; ".join(dict.fromkeys(self.refused.get(unit, ()))) or none


def derivation(model: Any) -> Derivation:
    """Read the row off a small instance, and prove it there."""
    cls = type(model)

    def on_meta(config: Any) -> Any:
        return build(cls, config, "meta", model.dtype)

    config, added = explicit(on_meta, model.config)
    if added:
        model = build(cls, config, dtype=model.dtype)
        randomize_(model)
    found = list(effects(on_meta, config))
    reading = _reading(on_meta(config), [e for e in found if isinstance(e, Effect)], added)
    for reason in (e for e in found if isinstance(e, str)):
        reading.refuse("keys", reason)
    subject = prove.Subject(model, feeds(model))
    stacks = derive.stacks(reading)
    result = Derivation(Family(model.config.model_type, ()), cls.__name__, refused=reading.refused)
    rows = _units(subject, reading, stacks, result)
    whole = [
        _layers(subject, replace(stack, sublayers=_told_apart(rows.get(stack.name, ()))), result) for stack in stacks
    ]
    tokens = _tokens(subject, reading, result)
    kept = tuple(stack for stack in whole if stack.sublayers or stack.axis.config)
    told = (unit for unit in UNITS if unit in result.refused or unit in EXPECTED)
    refused = tuple((unit, result.reason(unit)) for unit in told if unit not in result.proven)
    result.family = Family(model.config.model_type, kept, tokens=tokens, shapes=("stock",), refused=refused)
    return result


def _told_apart(rows: Sequence[Sublayer]) -> tuple[Sublayer, ...]:
    """Sublayers of one kind with names of their own: a dense FFN beside a shared expert's."""
    kinds = [row.kind for row in rows]
    numbers = [kinds[:index].count(kind) + 1 for index, kind in enumerate(kinds)]
    return tuple(replace(r, kind=r.kind if n == 1 else f"{r.kind}_{n}") for r, n in zip(rows, numbers, strict=True))


def _reading(model: Any, found: Sequence[Effect], added: Sequence[str]) -> Reading:
    base = next((f"{name}." for name, m in model.named_modules() if name and m is model.base_model), "")
    return Reading(model, Snapshot.of(model), found, added, dict(sizes(model.config)), base)


def _units(
    subject: prove.Subject, reading: Reading, stacks: Sequence[Stack], result: Derivation
) -> dict[str, list[Any]]:
    """The proven sublayers by stack."""
    rows: dict[str, list[Any]] = {}
    for candidate in derive.candidates(reading, stacks):
        reason = ""
        for alternative in candidate.alternatives():
            reason = prove.units(subject, alternative)
            if not reason:
                stock = _stock_of(subject, alternative) if candidate.word == "heads" else "any"
                for stack in alternative:
                    rows.setdefault(stack.name, []).extend(_with_stock(row, stock) for row in stack.sublayers)
                for word, key in _proven(candidate, alternative):
                    result.proven.setdefault(word, []).append(key)
                break
        if reason:
            result.refused.setdefault(candidate.word, []).append(f"{' and '.join(candidate.keys)}: {reason}")
    return rows


def _proven(candidate: derive.Candidate, stacks: Sequence[Stack]) -> list[tuple[str, str]]:
    """The units that a proven candidate holds, and the keys that size them."""
    if candidate.word != "experts":
        return [(candidate.word, candidate.keys[-1])]
    axes = dict.fromkeys(axis for stack in stacks for row in stack.sublayers for axis in row.axes)
    return list(dict.fromkeys((unit_word(axis), axis.config) for axis in axes if axis.stock != "none"))


ODD = 5  # a number of heads that divides no hidden size of a small instance


def _stock_of(subject: prove.Subject, stacks: Sequence[Stack]) -> Stock:
    """Whether the config takes any number of heads, or only divisors of the hidden size."""
    keys = {axis.config for stack in stacks for row in stack.sublayers for axis in row.axes}
    widths = {axis.width_config for stack in stacks for row in stack.sublayers for axis in row.axes} - {""}
    try:
        config = changed(subject.model.config, dict.fromkeys(keys, ODD))
        build(type(subject.model), config, "meta", subject.model.dtype)
    except Exception:  # whatever a class says of a config that it does not take
        return "divisors"
    return "any" if all(raw(config, key) for key in widths) else "divisors"


def _with_stock(row: Sublayer, stock: Stock) -> Sublayer:
    return replace(row, axes=tuple(replace(axis, stock=stock) for axis in row.axes))


def _layers(subject: prove.Subject, stack: Stack, result: Derivation) -> Stack:
    """The stack, whose layers can go if that is proven."""
    fixed, reason = prove.layers(subject, stack) if stack.axis.config else ((), "no key counts them")
    if reason:
        result.refused.setdefault("layers", []).append(f"{stack.layers}: {reason}")
        return replace(stack, axis=Axis("layers", "", "none"))
    result.proven.setdefault("layers", []).append(stack.axis.config)
    return replace(stack, axis=replace(stack.axis, fixed=fixed))


def _tokens(subject: prove.Subject, reading: Reading, result: Derivation) -> Axis | None:
    """The vocabulary, if a smaller one is proven."""
    rows = {(part.tensor, part.dim) for part in token_parts(subject.model, [])}
    keys = [effect.key for effect in reading.effects if rows & effect.shapes.keys()]
    for key in keys:
        reason = prove.tokens(subject, key)
        if not reason:
            result.proven["tokens"] = [key]
            return Axis("tokens", key)
        result.refused.setdefault("tokens", []).append(f"{key}: {reason}")
    return None
