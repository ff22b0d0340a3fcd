"""The one decision object: which units of the dense model are kept, and where. Frozen, JSON, no tensors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from typing import Any

from .files import parse_json, read_json, write_text

FORMAT = 2
WITHIN = {
    "heads": "kv_groups",
    "neurons": "experts",
}  # axis -> the one of the same place whose units each hold several of its own
AXIS_OF_FORMAT_1 = {"head": "heads", "kv_group": "kv_groups", "neuron": "neurons"}  # its word for a unit
STEM = "stem"  # the stack of convolutions in front of the layers, as in `model.axes`, which imports nothing
# (stack, layer, kind) of a site, (stack,) of its layers, (name,) of another axis of the model, () of its vocabulary
Where = tuple[Any, ...]


@dataclass(frozen=True)
class Kept:
    """The units of one axis that are kept at one place: sorted indices into the `of` units of the dense model.

    Where a site has two axes, heads within kv_groups, one of them is named: what is kept of the other follows.
    """

    where: Where
    axis: str
    of: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", _place(self.where))
        if not isinstance(self.axis, str) or not self.axis or not _is_count(self.of):
            raise ValueError(
                f"{self.name}, {short(self.axis)} of {short(self.of)}: an axis is a word (heads, neurons, layers), and "
                "`of` a whole number."
            )
        object.__setattr__(self, "kept", _indices(self.kept, self.name))
        if not self.kept:
            raise ValueError(f"{self.name}: a plan must keep at least one of the {self.axis}.")
        if list(self.kept) != sorted(set(self.kept)) or self.kept[0] < 0 or self.kept[-1] >= self.of:
            raise ValueError(
                f"{self.name}: kept indices must be sorted, without repeats and within 0..{self.of - 1}; got "
                f"{short(self.kept)}."
            )

    @property
    def name(self) -> str:
        return name_of(self.where)

    @property
    def is_identity(self) -> bool:
        return len(self.kept) == self.of


def name_of(where: Where) -> str:
    """A place in words.

    >>> name_of(("encoder", 3, "ffn"))
    'encoder layer 3 ffn'
    """
    stack, *rest = where or ("the vocabulary",)
    return f"{stack} layer {' '.join(map(str, rest))}" if rest else str(stack)


def _place(where: Any) -> Where:
    """A place as a tuple.

    Raises:
        ValueError: it is none.
    """
    place = tuple(where) if isinstance(where, list | tuple) else (where,)
    kinds = [isinstance(word, str) for word in place]
    if kinds in ([], [True]) or (kinds == [True, False, True] and _is_count(place[1])):
        return place
    raise ValueError(
        f"{short(where)} is no place: give (stack, layer, kind) of a site, (stack,) of its layers, or () of the "
        "vocabulary."
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _indices(kept: Any, where: str) -> tuple[int, ...]:
    if isinstance(kept, Sequence) and not any(isinstance(unit, bool) for unit in kept):
        with contextlib.suppress(TypeError):
            return tuple(index(unit) for unit in kept)
    raise ValueError(f"{where}: `kept` is a list of whole numbers, got {short(kept)}.")


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _as_inner(kept: Kept, axis: str, share: int) -> Kept:
    """A plan of units that each hold several of another axis as the plan of those."""
    inner = tuple(unit * share + j for unit in kept.kept for j in range(share))
    return replace(kept, axis=axis, of=kept.of * share, kept=inner)


def _compose_place(first: Kept, then: Kept) -> Kept:
    if WITHIN.get(then.axis) == first.axis:  # the finer axis can say both
        first = _as_inner(first, then.axis, max(then.of // len(first.kept), 1))
    elif WITHIN.get(first.axis) == then.axis:
        then = _as_inner(then, first.axis, max(len(first.kept) // then.of, 1))
    if (then.axis, then.of) != (first.axis, len(first.kept)):
        raise ValueError(
            f"{then.name}: the second plan was made for {then.of} {then.axis}, the first keeps {len(first.kept)} "
            f"{first.axis}."
        )
    return replace(first, kept=tuple(first.kept[i] for i in then.kept))


@dataclass(frozen=True)
class PruningPlan:
    """Kept units by place into the dense model, with how it was decided (`config`) and what it costs (`cost`).

    Layers and vocabulary that a plan does not name stay whole; sites are named in every layer that stays, and in no
    other. Those of a stem are named all or not at all: then they stay whole.
    """

    model_type: str
    kept: tuple[Kept, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("model_type", str), ("kept", Sequence), ("config", Mapping), ("cost", Mapping)):
            if not isinstance(getattr(self, name), kind) or (kind is Sequence and isinstance(self.kept, str)):
                raise ValueError(
                    f"A plan's {name!r} is a {kind.__name__.lower()}, got {short(getattr(self, name))}: restore the "
                    "plan, or make one with prune()."
                )
        object.__setattr__(self, "kept", tuple(self.kept))
        other = next((kept for kept in self.kept if not isinstance(kept, Kept)), None)
        if other is not None:
            raise ValueError(f"A plan holds Kept(...), got {short(other)}; PruningPlan.from_dict reads mappings.")
        for name in ("config", "cost"):
            _must_be_json(name, getattr(self, name))
        places = [kept.where for kept in self.kept]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise ValueError(f"A plan names each place once; found {twice} twice.")
        gone = [kept.name for kept in self.sites if not self.has_layer(*kept.where[:2])]
        if gone:
            raise ValueError(f"{gone[0]}: the plan drops that layer, and cannot keep units of it.")

    @property
    def sites(self) -> tuple[Kept, ...]:
        """What is kept of the sites."""
        return tuple(kept for kept in self.kept if len(kept.where) == 3)

    def layers(self, stack: str, of: int) -> tuple[int, ...]:
        """The layers of a stack of `of` that are kept."""
        found = self.get((stack,))
        return tuple(range(of)) if found is None else found.kept

    def has_layer(self, stack: str, layer: int) -> bool:
        found = self.get((stack,))
        return found is None or layer in found.kept

    def names(self, where: Where) -> bool:
        """Whether the plan speaks of the stack of a site: of a stem it need not."""
        return where[0] != STEM or any(kept.where[0] == STEM for kept in self.sites)

    def get(self, where: Where) -> Kept | None:
        return next((kept for kept in self.kept if kept.where == where), None)

    def __getitem__(self, where: Where) -> Kept:
        found = self.get(where)
        if found is None:
            raise KeyError(f"The plan has no place {where!r}; it has {short([kept.where for kept in self.kept])}.")
        return found

    @property
    def is_identity(self) -> bool:
        return all(kept.is_identity for kept in self.kept)

    @property
    def hash(self) -> str:
        """sha256 of what is kept, in a canonical order: the identity of the decision."""
        places = sorted(([*map(str, k.where)], k.axis, k.of, list(k.kept)) for k in self.kept)
        return _sha256(places)

    def is_named(self, name: str) -> bool:
        """Whether this is the plan of a hash, also of one that a file of format 1 says."""
        return name in (self.hash, self._hash_of_format_1)

    @property
    def _hash_of_format_1(self) -> str:
        words = {axis: unit for unit, axis in AXIS_OF_FORMAT_1.items()}
        sites = [
            dict(zip(("stack", "layer", "kind"), k.where, strict=True))
            | {"unit": words.get(k.axis), "of": k.of, "kept": list(k.kept)}
            for k in self.sites
        ]
        return _sha256(sorted(sites, key=lambda site: (site["stack"], site["layer"], site["kind"])))

    def check(self, model_type: str, sizes: Mapping[Where, Mapping[str, int]]) -> None:
        """Raise ValueError unless the plan was made for this model type and these sizes (place -> axis -> units)."""
        if model_type != self.model_type:
            raise ValueError(
                f"This plan was made for model_type {self.model_type!r}, the model is {model_type!r}. "
                f"Make a plan for this model with prune()."
            )
        wrong = [
            f"{kept.where}: plan {kept.of} {kept.axis}, model {sizes.get(kept.where, {}).get(kept.axis, 'none there')}"
            for kept in self.kept
            if sizes.get(kept.where, {}).get(kept.axis) != kept.of
        ]
        named = {kept.where for kept in self.kept}
        missing = [place for place in sizes if len(place) == 3 and place not in named and self.names(place)]
        wrong += [f"{place}: not in the plan" for place in missing if self.has_layer(*place[:2])]
        if wrong:
            raise ValueError(
                f"This plan ({self.hash[:12]}) was made for another model; {len(wrong)} places differ, first "
                f"{wrong[0]}. Use the model that it was made for, or make a plan with prune()."
            )

    def compose(self, then: PruningPlan) -> PruningPlan:
        """This plan followed by `then` (made for the model that this one leaves), as one plan for the dense model.

        Raises:
            ValueError: `then` was made for another model. TypeError: it is no plan.
        """
        must_be_plan(then)
        later = {self._dense_place(kept.where): kept for kept in then.kept}
        known = {kept.where for kept in self.kept}
        unknown = [
            kept.where for place, kept in later.items() if len(place) == 3 and place not in known and self.names(place)
        ]
        if unknown or then.model_type != self.model_type:
            raise ValueError(
                f"The second plan is a {then.model_type}'s, the first a {self.model_type}'s, which has no "
                f"{unknown[0] if unknown else then.model_type + ' sites'}: it was made for another model."
            )
        joined = [_compose_place(k, later[k.where]) if k.where in later else k for k in self.kept]
        joined += [kept for place, kept in later.items() if place not in known]  # whole until then
        wide = {k.where: k for k in joined if len(k.where) < 3}
        kept = [k for k in joined if len(k.where) < 3 or _stays(k.where, wide.get(k.where[:1]))]
        before = self.cost.get("before") or then.cost.get("before")
        cost = {**then.cost, **({"before": before} if before else {})}
        return PruningPlan(self.model_type, tuple(kept), then.config, cost)

    def _dense_place(self, where: Where) -> Where:
        """Where a place of the model that this plan leaves is in the dense one."""
        found = self.get(where[:1]) if len(where) == 3 else None
        if found is None:
            return where
        if where[1] >= len(found.kept):
            raise ValueError(
                f"{name_of(where)}: the first plan leaves {len(found.kept)} layers. It is another model's."
            )
        return (where[0], found.kept[where[1]], where[2])

    def summary(self) -> str:
        """A line for each stack and kind: kept counts per layer."""
        rows: dict[Where, list[Kept]] = {}
        for kept in self.kept:
            rows.setdefault((*kept.where[:1], *kept.where[2:]), []).append(kept)
        return "\n".join(_line(place, kept) for place, kept in rows.items())

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model_type": self.model_type,
            "kept": [{**vars(kept), "where": list(kept.where), "kept": list(kept.kept)} for kept in self.kept],
            "config": dict(self.config),
            "cost": dict(self.cost),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """What `to_dict` gave, also of format 1.

        Raises:
            ValueError: something else; the message names the field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A plan is a mapping, got {type(data).__name__}.")
        if data.get("format") not in (1, FORMAT):
            raise ValueError(f"Plan format {data.get('format')!r} is not 1 or {FORMAT}; upgrade hf_prune.")
        field_name, read_one = ("sites", _kept_from_format_1) if data["format"] == 1 else ("kept", _kept_from)
        kept = data.get(field_name)
        read = tuple(read_one(each) for each in kept) if isinstance(kept, list | tuple) else kept
        return cls(data.get("model_type"), read, data.get("config", {}), data.get("cost", {}))  # type: ignore[arg-type]

    def to_json(self) -> str:
        """With a line for each place."""
        rest = self.to_dict()
        kept = ",\n".join(f"  {json.dumps(each)}" for each in rest.pop("kept"))
        return f'{json.dumps(rest, indent=1)[:-2]},\n "kept": [\n{kept}\n ]\n}}'

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        return cls.from_dict(parse_json(text, "The plan"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_text(path, self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file. ValueError: no plan; the message names the field.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def diff(self, other: PruningPlan) -> Iterable[tuple[Where, tuple[int, ...], tuple[int, ...]]]:
        """(place, units kept only here, units kept only in `other`) for every place that differs."""
        must_be_plan(other)
        for place in dict.fromkeys(kept.where for kept in (*self.kept, *other.kept)):
            mine, theirs = _units_at(place, self, other), _units_at(place, other, self)
            if mine != theirs:
                yield place, tuple(sorted(mine - theirs)), tuple(sorted(theirs - mine))


def _units_at(place: Where, plan: PruningPlan, other: PruningPlan) -> set[int]:
    """What one of two plans keeps at a place that at least one of them names."""
    found = plan.get(place)
    if found is None:  # layers and tokens are whole, units of a site are gone with their layer
        return set(range(other[place].of)) if len(place) < 3 else set()
    return set(found.kept)


def _stays(where: Where, layers: Kept | None) -> bool:
    return layers is None or where[1] in layers.kept


def _line(place: Where, kept: Sequence[Kept]) -> str:
    counts, first = [len(each.kept) for each in kept], kept[0]
    shown = f"{counts[0]:,}" if len(set(counts)) == 1 else ", ".join(map(str, counts))
    if len(place) == 2:
        return f"{' '.join(place)}: {shown} of {first.of} {first.axis} in {len(kept)} layers"
    gone = sorted({*range(first.of)} - {*first.kept}) if first.axis == "layers" else []
    without = f" (without {', '.join(map(str, gone))})" if gone else ""
    words = dict.fromkeys((*place, first.axis))
    return f"{' '.join(words)}: {shown} of {first.of:,}{without}"


def _sha256(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def must_be_plan(plan: Any) -> None:
    """Raise TypeError for anything but a plan, and say how it becomes one."""
    if not isinstance(plan, PruningPlan):
        raise TypeError(
            f"A plan is a PruningPlan, got {type(plan).__name__}. PruningPlan.load(path) reads a file, "
            "PruningPlan.from_dict(...) a mapping; PruneResult.plan is one."
        )


def _must_be_json(name: str, value: Mapping[str, Any]) -> None:
    try:
        json.dumps(dict(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"A plan's {name!r} goes into a JSON file, which cannot hold {short(value)}: {error}."
        ) from error


def _fields(each: Any, names: Sequence[str]) -> list[Any]:
    missing = [name for name in names if not isinstance(each, Mapping) or name not in each]
    if missing:
        raise ValueError(f"What a plan keeps has {', '.join(names)}; {short(each)} has no {', '.join(missing)}.")
    return [each[name] for name in names]


def _kept_from(each: Any) -> Kept:
    return Kept(*_fields(each, ("where", "axis", "of", "kept")))


def _kept_from_format_1(site: Any) -> Kept:
    stack, layer, kind, unit, of, kept = _fields(site, ("stack", "layer", "kind", "unit", "of", "kept"))
    if not isinstance(unit, str) or unit not in AXIS_OF_FORMAT_1:
        raise ValueError(f"{short(site)}: unit {short(unit)} is not one of {', '.join(AXIS_OF_FORMAT_1)}.")
    return Kept((stack, layer, kind), AXIS_OF_FORMAT_1[unit], of, kept)
