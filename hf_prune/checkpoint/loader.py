"""The loader: transformers builds pruned checkpoints to the sizes that their config means."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .layout import HOME, KEY, build_, check_sizes, needs_loader

MARK = "_hf_prune_loader"  # on what this file has put in place


def install_loader() -> None:
    """Teach transformers to build the shapes that a pruned config means; runs at `import hf_prune`.

    `PreTrainedModel.__new__` is the one door that every construction passes; another library that stands there already
    is asked next. A class that meets a pruned config there has its `__init__` wrapped, once; all others are left alone.
    The config shows dense sizes and no `per_layer_config` while the stock class builds, so this stays right when
    transformers ships its own modelling half.
    """
    following: Any = PreTrainedModel.__new__
    if hasattr(following, MARK):
        return

    def __new__(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        config: Any = args[0] if args else kwargs.get("config")
        is_pruned = bool(getattr(config, "__dict__", {}).get(KEY))
        if is_pruned:
            _meet(cls, config)
        made = object.__new__(cls) if following is object.__new__ else following(cls, *args, **kwargs)
        if is_pruned and config._name_or_path and Path(config._name_or_path).is_dir():
            made.__dict__[HOME] = str(Path(config._name_or_path).resolve())  # also after a change of directory
        return made

    setattr(__new__, MARK, True)
    PreTrainedModel.__new__ = staticmethod(__new__)  # type: ignore[method-assign, assignment]


def _meet(cls: type[PreTrainedModel], config: Any) -> None:
    """Raise ValueError for sizes that cannot be meant, and see to it that the class builds the others."""
    if needs_loader(config):
        if MARK not in cls.__dict__:
            _wrap_init(cls)
    elif config.__dict__[KEY].get("dense"):
        check_sizes(config)


def _wrap_init(cls: Any) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        build_(self, functools.partial(init, self), config, *args, **kwargs)

    cls.__init__ = __init__
    setattr(cls, MARK, True)
