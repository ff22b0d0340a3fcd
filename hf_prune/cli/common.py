"""Arguments that several commands take, and what they mean."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import UNIT_CHOICES, PruningConfig
from ..data.opening import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")


def model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="A local directory or a Hub id (token from the environment).")
    command.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    command.add_argument("--task", choices=TASKS, help="Which head to open; default: what config.json names.")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="Default: auto, as saved.")
    command.add_argument("--device-map", help="As in from_pretrained. Default: the GPU if there is one, else the CPU.")


def tokenizer_argument(command: Any) -> None:
    command.add_argument("--tokenizer", help="Directory or Hub id of the tokenizer. Default: the model's.")


# --- types of arguments; argparse shows the sentence of an ArgumentTypeError ------------------------------------------


def at_least(least: int) -> Callable[[str], int]:
    def number(given: str) -> int:
        if not given.strip().lstrip("-").isdecimal() or int(given) < least:
            raise argparse.ArgumentTypeError(f"{given!r} is no whole number of at least {least}")
        return int(given)

    return number


def numbers(given: str) -> list[int]:
    return [at_least(1)(part) for part in given.split(",")]


def path(given: str) -> Path:
    if not given.strip():
        raise argparse.ArgumentTypeError("the path is empty; for the current directory write .")
    return Path(given)


def directory(given: str) -> Path:
    """A directory to write into, which need not be there yet."""
    found = path(given)
    above = next(place for place in (found, *found.absolute().parents) if place.exists())
    if not above.is_dir():
        raise argparse.ArgumentTypeError(f"{above} is a file; name a directory")
    return found


def fractions(given: str) -> list[float]:
    """Values of `keep`, separated by commas, that differ in the names of their output directories."""
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{given!r}: give numbers, 0 < keep <= 1, separated by commas") from None
    names = [f"{keep:g}" for keep in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise argparse.ArgumentTypeError(f"{given!r} has {twice} twice (to six digits); give each once")
    return found


# --- what they mean --------------------------------------------------------------------------------------------------


def config_argument(group: Any, name: str) -> None:
    """A flag made from a PruningConfig field; absent from the result unless given, so that presets show through."""
    field = next(field for field in fields(PruningConfig) if field.name == name)
    hint = typing.get_type_hints(PruningConfig)[name]
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    options: dict[str, Any] = {"type": kinds[0]}
    literal = next((kind for kind in (hint, *kinds) if typing.get_origin(kind) is Literal), None)
    if literal is not None:
        options = {"choices": typing.get_args(literal)}
    text = field.metadata["help"].replace("%", "%%")
    if name == "keep":
        options, text = {"type": fractions}, f"{text} Several, separated by commas, give one table."
    elif name == "units":
        options, text = {"type": lambda given: given.split(",")}, f"{text} Separated by commas."
    elif field.default is not None:
        text += f" Default: {field.default}."
    flag = f"--{name.replace('_', '-')}"
    group.add_argument(flag, default=argparse.SUPPRESS, metavar=_metavar(name, options), help=text, **options)


def _metavar(name: str, options: Mapping[str, Any]) -> str | None:
    if "choices" in options:
        return None
    return {"keep": "0.5[,0.6,...]", "units": ",".join(UNIT_CHOICES)}.get(name, name.upper())


def open_model(options: argparse.Namespace) -> PreTrainedModel:
    from ..data.opening import load_model

    return load_model(
        options.model, options.task, revision=options.revision, dtype=options.dtype, device_map=device_of(options)
    )


def device_of(options: argparse.Namespace) -> str | None:
    """Where a model goes that is opened; None: to the CPU."""
    import torch

    return options.device_map or ("cuda" if torch.cuda.is_available() else None)
