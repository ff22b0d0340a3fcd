"""What can be cut from which model type, or from one of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from typing import Any


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("types", nargs="*", metavar="TYPE", help="Model types, such as bert; default: all.")
    command.add_argument("--json", action="store_true", help="Print JSON, with the reasons of what is refused.")
    command.add_argument("--markdown", action="store_true", help="Print the page of the documentation.")
    command.add_argument(
        "--prove",
        action="store_true",
        help="Prove it anew on small instances: about 20 minutes on two cores for all types.",
    )
    command.add_argument(
        "--save", action="store_true", help="With --prove: keep what was found as hf_prune's own table."
    )


def run(options: argparse.Namespace) -> None:
    from ..report import families
    from ..report.table import console, rich_table

    known = families.all_types()
    unknown = [name for name in options.types if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no model type of this transformers. hf-prune families lists them all.")
    if options.save and not options.prove:
        raise ValueError("--save keeps what --prove finds: give both.")
    if options.prove:
        found = {"rows": _proven(options.types or known, save=options.save, keep=bool(options.types))}
    else:
        found = families.read()
        found["rows"] = [row for row in found["rows"] if not options.types or row["type"] in options.types]
    screen = console()
    if options.json:
        screen.print(json.dumps(found, indent=1), markup=False, highlight=False, soft_wrap=True)
    elif options.markdown:
        screen.print(families.markdown(families.read()).rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
    else:
        screen.print(rich_table(families.table_rows(found["rows"]), title="What can be cut"))
        for unit, each in families.counts(found["rows"]).items():
            screen.print(f"{unit}: {each['stock']} types in stock shapes, {each['per layer only']} more per layer")


def _proven(types: list[str], save: bool, keep: bool) -> list[dict[str, Any]]:
    """The rows of these types; saved every minute, so that what is done is not lost.

    Args:
        keep: leave the rows of other types in the table as they are.
    """
    from tqdm.auto import tqdm

    from ..report import families

    rows: dict[str, dict[str, Any]] = {}
    before = {row["type"]: row for row in families.read()["rows"]} if keep and families.FILE.exists() else {}
    saved = time.monotonic()
    for row in tqdm(families.prove(types), total=len(types), desc="proving", file=sys.stderr):
        rows[row["type"]] = row
        if save and (time.monotonic() > saved + 60 or len(rows) == len(types)):
            families.save((before | rows).values(), date.today().isoformat())
            saved = time.monotonic()
    return list(rows.values())
