"""The command line: `hf-prune COMMAND`. A command is a module of `hf_prune.cli`.

An error that the user can mend (a wrong argument, file, model or data, no memory) ends with exit code 2 and one line on
standard error, `error: ...`; Ctrl-C ends with 130. Any other error is a bug in hf-prune and shows its traceback, to be
reported. `--debug` shows the traceback of every error.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import bench, card, check, demo, export, families, inspect, prune, push, train

COMMANDS = (demo, inspect, check, families, prune, train, bench, export, card, push)
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError)  # FileNotFoundError etc. are OSErrors
OURS = (TypeError, RuntimeError)  # the user's to mend where hf_prune raised them, a bug where another library did
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")  # in RuntimeErrors of torch
USER_ERROR, INTERRUPTED = 2, 130  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 if it worked, 2 after an error of the user's, 130 if it was interrupted."""
    options = parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _quiet_transformers()
            options.run(options)
        except KeyboardInterrupt:
            if options.debug:
                raise
            sys.stderr.write("interrupted\n")
            return INTERRUPTED
        except Exception as error:
            if options.debug or not _is_users(error):
                raise
            sys.stderr.write(f"error: {_line(error)}\n")
            return USER_ERROR
    return 0


def _is_users(error: Exception) -> bool:
    if isinstance(error, USER_ERRORS) or _lacks_memory(error):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, OURS) and Path(raised_in).is_relative_to(Path(__file__).parent.parent)


def _lacks_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(t in text for t in NO_MEMORY))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return (
        f"no memory left; take fewer or shorter examples, or a smaller model ({text})" if _lacks_memory(error) else text
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"warning: {message}\n")


def _quiet_transformers() -> None:
    """Turn off transformers' progress bars and notes on loading and saving, which would interrupt ours."""
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
