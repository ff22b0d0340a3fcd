"""Write the model card of a pruned checkpoint, with its pictures."""

from __future__ import annotations

import argparse


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR", help="A directory that hf_prune saved.")
    command.add_argument("--name", help="What opens it: a Hub id or a path. Default: the directory's name.")
    command.add_argument("--base-model", help="Hub id of the dense model. Default: what was loaded.")
    command.add_argument("--license", help="Default: that of the base model's card, where it is in reach.")
    command.add_argument("--datasets", type=lambda text: text.split(","), help="Hub ids, comma-separated.")


def run(options: argparse.Namespace) -> None:
    from ..report.card import write_card
    from ..report.table import console

    path = write_card(
        options.directory,
        name=options.name,
        base_model=options.base_model,
        license=options.license,
        datasets=options.datasets,
    )
    console().print(f"Written: {path}", markup=False)
