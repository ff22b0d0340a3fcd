"""What can be cut from which model type: rows from the hand-written families, and from what is derived and proven.

`families.json` beside this file is what `hf-prune families --prove` found, with its date and the versions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..files import write_text
from ..model.axes import Family
from ..model.configs import holder
from ..model.families import FAMILIES, registered
from ..model.instance import classes_of, instance, quiet
from ..model.lookup import UNITS, Derivation, derivation, unit_word
from ..model.sites import find_sites

FILE = Path(__file__).with_name("families.json")
SECONDS = 90  # for one type
FORMS = {"stock": "stock", "per_layer": "per layer", "": "–"}

Row = dict[str, Any]


def all_types() -> list[str]:
    """The model types that transformers has a class for, and those with a row."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return sorted({*(name for name in CONFIG_MAPPING_NAMES if classes_of(name)), *FAMILIES})


def read() -> dict[str, Any]:
    """What was proven last: date, versions, and a row for each type."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def prove(types: Sequence[str], workers: int = 2, seconds: float = SECONDS) -> Iterator[Row]:
    """A row for each type as it is done, each proven anew in a process of its own, which is ended when time is up."""
    context, left = get_context("fork"), list(types)
    running: dict[Any, tuple[str, Any, float]] = {}  # what a process sends through -> (type, process, start)
    try:
        while left or running:
            while left and len(running) < workers:
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_send_row, args=(left[0], theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (left.pop(0), process, time.monotonic())
            ready = wait([*running], timeout=1)
            late = [pipe for pipe, (_, _, start) in running.items() if time.monotonic() > start + seconds]
            for pipe in dict.fromkeys([*ready, *late]):
                model_type, process, _ = running.pop(pipe)
                yield _received(model_type, pipe if pipe in ready else None, seconds)
                process.kill()
                process.join()
    finally:
        for _, process, _ in running.values():
            process.kill()


def _send_row(model_type: str, pipe: Any) -> None:
    pipe.send(row_of(model_type))


def _received(model_type: str, pipe: Any, seconds: float) -> Row:
    if pipe is None:
        return {"type": model_type, "why": f"not done in {seconds:.0f} s", "seconds": seconds}
    try:
        found: Row = pipe.recv()
    except EOFError:
        return {"type": model_type, "why": "its process died (no memory?)", "seconds": 0.0}
    return found


def row_of(model_type: str) -> Row:
    """What can be cut from models of a type, in stock shapes and per layer, and why what cannot is refused."""
    started = time.monotonic()
    try:
        with quiet():
            model = instance(model_type)
            found = derivation(model)
    except Exception as error:  # whatever a class does
        return {"type": model_type, "why": _short(error), "seconds": round(time.monotonic() - started, 1)}
    hand = registered(model_type)
    row: Row = {
        "type": model_type,
        "class": found.class_name,
        "by": "hand" if hand else "derived",
        "stock": _stock(hand, found),
        "per_layer": _per_layer(hand),
        "derived": {unit: keys for unit, keys in found.proven.items() if unit in UNITS},
        "refused": {},
        "seconds": round(time.monotonic() - started, 1),
    }
    if hand:
        row["differs"] = differences(model, hand, found)
    here = {*row["stock"], *row["per_layer"]}
    why = dict(hand.refused) if hand else {}
    row["refused"] = {unit: why.get(unit, found.reason(unit))[:200] for unit in UNITS if unit not in here}
    return row


def _short(error: Exception) -> str:
    """The last line of an error: of many small configs that do not run, why the last does not."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:240]


def _stock(hand: Family | None, found: Derivation) -> list[str]:
    """Units that a stock config can have fewer of: by the row, and by what is proven."""
    said = {unit_word(axis) for axis in _axes(hand) if axis.stock != "none"} if hand else set()
    said |= {"hidden"} if hand and hand.hidden else set()
    return [unit for unit in UNITS if unit in said or found.proven.get(unit)]


def _per_layer(hand: Family | None) -> list[str]:
    """Units of which every layer can have other numbers: with a row, those of its sublayers."""
    said = {unit_word(axis) for axis in _axes(hand)} if hand else set()
    return [unit for unit in UNITS if unit in said]


def _axes(family: Family | None) -> list[Any]:
    return [axis for stack in (family.stacks if family else ()) for row in stack.sublayers for axis in row.axes]


def differences(model: Any, hand: Family, found: Derivation) -> list[str]:
    """Where a hand-written row and the derived one do not say the same of a small instance."""
    ours = {f"{site.path}.{site.consumer}": site for site in find_sites(model, hand)}
    shown = replace(found.family, stacks=tuple(s for s in found.family.stacks if s.sublayers))
    theirs = find_sites(model, shown) if shown.stacks else []
    wrong = []
    for site in theirs:
        own = ours.get(f"{site.path}.{site.consumer}")
        if own is None:
            wrong.append(f"{site.name}: only derived ({site.consumer})")
        elif differ := _said(own, model.config) ^ _said(site, model.config):
            wrong.append(f"{site.name}: {sorted(differ)[:2]}")
    return wrong


def _said(site: Any, config: Any) -> set[tuple[Any, ...]]:
    """What a site says: which tensors its units run along, in which order, and what sizes them."""
    parts = {
        (part.tensor, part.dim, *((axis, part.entries(axis, site.widths)) for axis in part.axes))
        for part in site.parts
        if part.role != "carries"
    }
    keys = {axis.name: holder(config, axis.config) for axis in site.row.axes}
    own = {name: inside.attribute_map.get(key, key) for name, (inside, key) in keys.items()}  # a key of several names
    return parts | {(axis.name, own[axis.name], site.sizes[axis.name]) for axis in site.row.axes}


def save(rows: Iterable[Row], date: str) -> None:
    """Write what was proven, a line for each type."""
    import torch
    import transformers

    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in sorted(rows, key=lambda row: row["type"]))
    head = {"date": date, "transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    write_text(FILE, f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def counts(rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """How many types can have fewer of each unit, in stock shapes and only per layer."""
    ran = [row for row in rows if "why" not in row]
    return {
        unit: {
            "stock": sum(unit in row["stock"] for row in ran),
            "per layer only": sum(unit in row["per_layer"] and unit not in row["stock"] for row in ran),
        }
        for unit in UNITS
    }


def table_rows(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Of each type the form of each unit; of types that do not run the reason."""
    return [
        {"model type": row["type"], "row": row.get("by", "–")}
        | {unit: FORMS[form_of(row, unit)] for unit in UNITS}
        | {"refused": row.get("why") or "; ".join(f"{unit}: {why}" for unit, why in row["refused"].items())}
        for row in rows
    ]


def form_of(row: Mapping[str, Any], unit: str) -> str:
    """The plainest form in which a type can have fewer of a unit; "": none."""
    return next((form for form in ("stock", "per_layer") if unit in row.get(form, ())), "")


def markdown(found: Mapping[str, Any]) -> str:
    """The page of the documentation."""
    rows = found["rows"]
    ran = [row for row in rows if "why" not in row]
    total = "\n".join(f"| {unit} | {each['stock']} | {each['per layer only']} |" for unit, each in counts(rows).items())
    lines = "\n".join(
        f"| {row['type']} | {row['by']} | {' | '.join(FORMS[form_of(row, unit)] for unit in UNITS)} |" for row in ran
    )
    rest = "\n".join(f"- `{row['type']}`: {row['why']}" for row in rows if "why" in row)
    table = {"units": " | ".join(UNITS), "rule": "---|" * len(UNITS), "rows": lines, "total": total, "rest": rest}
    return PAGE.format(**{**found, **table, "ran": len(ran), "all": len(rows)})


PAGE = """# What can be cut from which model type

Made by `hf-prune families --prove` (`make test-families`) on {date} with transformers {transformers} and torch {torch};
not edited by hand. Each type is built small in float64 and cut: its outputs must equal those of the masked model, in
place and built anew from the smaller config, and every matrix that is sliced must matter to them. "stock": a plain
checkpoint says it, the same number in every layer. "per layer": only hf_prune's loader opens it. "hand": a row in
`hf_prune/model/families`; "derived": the model's own config told. `hf-prune check MODEL` does the same for one model.

{ran} of {all} types run as a small instance.

| units | stock | only per layer |
|---|--:|--:|
{total}

| model type | row | {units} |
|---|---|{rule}
{rows}

## Types of which no small instance runs here

{rest}
"""
