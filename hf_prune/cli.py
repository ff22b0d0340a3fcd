"""The command line: `hf-prune COMMAND`. A command is a module of `hf_prune.commands`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from .commands import bench, card, demo, export, inspect, prune, push, train

COMMANDS = (demo, inspect, prune, train, bench, export, card, push)
USER_ERRORS = (ValueError, OSError, ImportError)  # a message, no traceback; FileNotFoundError etc. are OSErrors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it worked, 2 after a user's error, which is one line on standard error."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _quiet_transformers()
            options.run(options)
        except USER_ERRORS as error:
            if options.debug:
                raise
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            return 2
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")


def _quiet_transformers() -> None:
    """Its bars and notes on every load and save are noise between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hf-prune", description="Make a transformers checkpoint truly smaller.")
    top.add_argument("--version", action="version", version=version("hf-prune"))
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in COMMANDS:
        text = str(module.__doc__).partition("\n")[0]
        command = commands.add_parser(module.__name__.rpartition(".")[2], help=text, description=text)
        command.set_defaults(run=module.run)
        command.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        module.arguments(command)
    return top
