"""The one decision object: which units of the dense model are kept, per site. Frozen, JSON, no tensors."""

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

FORMAT = 1
UNITS = ("head", "kv_group", "neuron")
SiteKey = tuple[str, int, str]  # (stack, layer, kind)


@dataclass(frozen=True)
class SitePlan:
    """The kept units of one site: sorted indices into the `of` units of the dense model."""

    stack: str
    layer: int
    kind: str
    unit: str  # "head" · "kv_group" (one KV head with its query heads) · "neuron"
    of: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        where = f"{self.stack} layer {self.layer} {self.kind}"
        named = isinstance(self.stack, str) and isinstance(self.kind, str) and _is_count(self.layer)
        if not named or not _is_count(self.of):
            raise ValueError(
                f"{where}, of {self.of!r}: a site has a stack and a kind (words), a layer and `of` (whole numbers)."
            )
        if self.unit not in UNITS:
            raise ValueError(f"{where}: unit {self.unit!r} is not one of {', '.join(UNITS)}.")
        object.__setattr__(self, "kept", _indices(self.kept, where))
        if not self.kept:
            raise ValueError(f"{where}: a plan must keep at least one {self.unit}.")
        if list(self.kept) != sorted(set(self.kept)) or self.kept[0] < 0 or self.kept[-1] >= self.of:
            raise ValueError(
                f"{where}: kept indices must be sorted, without repeats and within 0..{self.of - 1}; got "
                f"{short(self.kept)}."
            )

    @property
    def key(self) -> SiteKey:
        return (self.stack, self.layer, self.kind)

    @property
    def is_identity(self) -> bool:
        return len(self.kept) == self.of


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


def _as_heads(site: SitePlan, heads_a_group: int) -> SitePlan:
    """A plan of KV groups as the plan of their query heads."""
    kept = tuple(g * heads_a_group + j for g in site.kept for j in range(heads_a_group))
    return replace(site, unit="head", of=site.of * heads_a_group, kept=kept)


def _compose_site(first: SitePlan, then: SitePlan) -> SitePlan:
    if {first.unit, then.unit} == {"head", "kv_group"}:
        if first.unit == "kv_group":
            first = _as_heads(first, then.of // len(first.kept))
        else:
            then = _as_heads(then, len(first.kept) // then.of)
    if (then.unit, then.of) != (first.unit, len(first.kept)):
        raise ValueError(
            f"{then.key}: the second plan was made for {then.of} {then.unit}s, the first keeps {len(first.kept)} "
            f"{first.unit}s."
        )
    return replace(first, kept=tuple(first.kept[i] for i in then.kept))


@dataclass(frozen=True)
class PruningPlan:
    """Kept indices per site into the dense model, with how it was decided (`config`) and what it costs (`cost`)."""

    model_type: str
    sites: tuple[SitePlan, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in (("model_type", str), ("sites", Sequence), ("config", Mapping), ("cost", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"A plan's {name!r} is a {kind.__name__.lower()}, got {short(getattr(self, name))}: restore the "
                    "plan, or make one with prune()."
                )
        object.__setattr__(self, "sites", tuple(self.sites))
        other = next((site for site in self.sites if not isinstance(site, SitePlan)), None)
        if other is not None:
            raise ValueError(f"A plan's sites are SitePlans, got {short(other)}; PruningPlan.from_dict reads mappings.")
        for name in ("config", "cost"):
            _must_be_json(name, getattr(self, name))
        keys = [site.key for site in self.sites]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"A plan names each site once; found {twice} twice.")

    def __getitem__(self, key: SiteKey) -> SitePlan:
        found = next((site for site in self.sites if site.key == key), None)
        if found is None:
            raise KeyError(f"The plan has no site {key!r}; it has {short([site.key for site in self.sites])}.")
        return found

    @property
    def is_identity(self) -> bool:
        return all(site.is_identity for site in self.sites)

    @property
    def hash(self) -> str:
        """sha256 of the canonical `sites`: the identity of the decision."""
        canonical = json.dumps(sorted(self.to_dict()["sites"], key=_site_order), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def check(self, model_type: str, sizes: Mapping[SiteKey, Mapping[str, int]]) -> None:
        """Raise ValueError unless the plan was made for this model type and these sizes (site -> unit -> count)."""
        if model_type != self.model_type:
            raise ValueError(
                f"This plan was made for model_type {self.model_type!r}, the model is {model_type!r}. "
                f"Make a plan for this model with prune()."
            )
        wrong = [
            f"{site.key}: plan {site.of} {site.unit}s, model {sizes.get(site.key, {}).get(site.unit, 'no such site')}"
            for site in self.sites
            if sizes.get(site.key, {}).get(site.unit) != site.of
        ]
        wrong += [f"{key}: not in the plan" for key in sizes if key not in {site.key for site in self.sites}]
        if wrong:
            raise ValueError(
                f"This plan ({self.hash[:12]}) was made for another model; {len(wrong)} sites differ, first "
                f"{wrong[0]}. Use the model that it was made for, or make a plan with prune()."
            )

    def compose(self, then: PruningPlan) -> PruningPlan:
        """This plan followed by `then` (made for the model that this one leaves), as one plan for the dense model.

        Raises:
            ValueError: `then` was made for another model. TypeError: it is no plan.
        """
        must_be_plan(then)
        later = {site.key: site for site in then.sites}
        unknown = [key for key in later if key not in {site.key for site in self.sites}]
        if unknown or then.model_type != self.model_type:
            raise ValueError(
                f"The second plan is a {then.model_type}'s, the first a {self.model_type}'s, which has no "
                f"{unknown[0] if unknown else then.model_type + ' sites'}: it was made for another model."
            )
        sites = tuple(_compose_site(site, later[site.key]) if site.key in later else site for site in self.sites)
        before = self.cost.get("before") or then.cost.get("before")
        return PruningPlan(self.model_type, sites, then.config, {**then.cost, **({"before": before} if before else {})})

    def summary(self) -> str:
        """One line a stack and kind: kept counts per layer."""
        rows: dict[tuple[str, str], list[SitePlan]] = {}
        for site in self.sites:
            rows.setdefault((site.stack, site.kind), []).append(site)
        lines = []
        for (stack, kind), sites in rows.items():
            counts = [len(site.kept) for site in sites]
            shown = str(counts[0]) if len(set(counts)) == 1 else ", ".join(map(str, counts))
            lines.append(f"{stack} {kind}: {shown} of {sites[0].of} {sites[0].unit}s in {len(sites)} layers")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        sites = [{**site.__dict__, "kept": list(site.kept)} for site in self.sites]
        return {
            "format": FORMAT,
            "model_type": self.model_type,
            "sites": sites,
            "config": dict(self.config),
            "cost": dict(self.cost),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningPlan:
        """What `to_dict` gave.

        Raises:
            ValueError: something else; the message names the field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"A plan is a mapping, got {type(data).__name__}.")
        if data.get("format") != FORMAT:
            raise ValueError(f"Plan format {data.get('format')!r} is not {FORMAT}; upgrade hf_prune.")
        sites = data.get("sites")
        read = tuple(_site_from(site) for site in sites) if isinstance(sites, Sequence) else sites
        return cls(data.get("model_type"), read, data.get("config", {}), data.get("cost", {}))  # type: ignore[arg-type]

    def to_json(self) -> str:
        """With a line for each site."""
        rest = self.to_dict()
        sites = ",\n".join(f"  {json.dumps(site)}" for site in rest.pop("sites"))
        return f'{json.dumps(rest, indent=1)[:-2]},\n "sites": [\n{sites}\n ]\n}}'

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

    def diff(self, other: PruningPlan) -> Iterable[tuple[SiteKey, tuple[int, ...], tuple[int, ...]]]:
        """(site, units kept only here, units kept only in `other`) for every site that differs."""
        must_be_plan(other)
        theirs = {site.key: set(site.kept) for site in other.sites}
        for site in self.sites:
            mine, their = set(site.kept), theirs.get(site.key, set())
            if mine != their:
                yield site.key, tuple(sorted(mine - their)), tuple(sorted(their - mine))


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


def _site_from(site: Any) -> SitePlan:
    fields = ("stack", "layer", "kind", "unit", "of", "kept")
    missing = [name for name in fields if not isinstance(site, Mapping) or name not in site]
    if missing:
        raise ValueError(f"A plan's site has {', '.join(fields)}; {short(site)} has no {', '.join(missing)}.")
    return SitePlan(**{name: site[name] for name in fields})


def _site_order(site: Mapping[str, Any]) -> tuple[str, int, str]:
    return (site["stack"], site["layer"], site["kind"])
