"""Prove on a small instance of a model what can be cut from it; no weights are read."""

from __future__ import annotations

import argparse
from typing import Any

from ..data.opening import TASKS


def arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL", help="A local directory, a Hub id, or a model type such as bert.")
    command.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    command.add_argument("--task", choices=TASKS, help="Which head to build; default: what config.json names.")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="Run the code that the model brings, where it brings some."
    )


def run(options: argparse.Namespace) -> None:
    from ..model.instance import instance, quiet
    from ..model.lookup import derivation
    from ..report.check import oracle_rows
    from ..report.table import console, rich_table

    config, cls = _config_and_class(options)
    with quiet():
        model = instance(config, cls)
        rows = oracle_rows(model, derivation(model))
    screen = console()
    screen.print(
        f"{options.model}: {type(model).__name__}, a small instance of {model.num_parameters():,} parameters in "
        f"{str(model.dtype).removeprefix('torch.')}",
        markup=False,
    )
    screen.print(rich_table(rows, title="What is proven"))


def _config_and_class(options: argparse.Namespace) -> tuple[Any, Any]:
    """The config (or a model type) and the class to build; None: the most telling one of the type."""
    import transformers

    from ..data.opening import load_config, model_class, remote_class

    if options.model in transformers.CONFIG_MAPPING:
        return options.model, None
    name, config = load_config(options.model, options.revision, options.trust_remote_code)
    remote = remote_class(config, name, options.revision) if options.trust_remote_code else None
    if remote is not None:
        return config, remote
    if options.task is None:
        return config, model_class(config, name)
    auto = getattr(transformers, TASKS[options.task])
    if type(config) not in auto._model_mapping:
        raise ValueError(f"--task {options.task}: transformers has no such class for a {config.model_type}.")
    return config, auto._model_mapping[type(config)]
