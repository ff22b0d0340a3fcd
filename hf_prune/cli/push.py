"""Upload a checkpoint to the Hub exactly as it was verified."""

from __future__ import annotations

import argparse


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR", help="A directory that hf_prune saved.")
    command.add_argument("repo", metavar="REPO", help="owner/name on the Hub; it is created if it is not there.")
    command.add_argument("--private", action="store_true", help="A new repository is private.")
    command.add_argument("--revision", help="A branch to commit to; it is created if it is not there.")


def run(options: argparse.Namespace) -> None:
    from ..checkpoint.hub import push
    from ..report.card import write_card
    from ..report.table import console

    url = push(options.directory, options.repo, private=options.private, revision=options.revision, card=write_card)
    console().print(f"Pushed: {url}", markup=False)
