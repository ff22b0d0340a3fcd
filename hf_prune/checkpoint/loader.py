"""Teach transformers to build pruned checkpoints in the sizes that their config gives."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .layout import FORMAT, HOME, KEY, build_, check_sizes, needs_loader

MARK = "_hf_prune_loader"  # attribute of what this file has put in place


def install_loader() -> None:
    """Make `from_pretrained` and every other construction understand pruned configs; runs at `import hf_prune`.

    Every construction calls `PreTrainedModel.__new__`, which is replaced here; where another library has replaced it
    before, that is called next. A class that is given a pruned config has its `__init__` wrapped, once; all other
    classes are left alone. While the stock class builds, the config shows dense sizes and no `per_layer_config`, so
    that this stays right when transformers builds such configs itself. A pruned config that reaches
    `PreTrainedModel.__init__` without a wrapped class is refused there.
    """
    following: Any = PreTrainedModel.__new__
    if hasattr(following, MARK):
        return

    def __new__(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        config = next((value for value in (*args, *kwargs.values()) if _is_pruned(value)), None)
        if config is not None:
            _meet(cls, config)
        made = object.__new__(cls) if following is object.__new__ else following(cls, *args, **kwargs)
        if config is not None and config._name_or_path and Path(config._name_or_path).is_dir():
            made.__dict__[HOME] = str(Path(config._name_or_path).resolve())  # cwd may change
        return made

    setattr(__new__, MARK, True)
    PreTrainedModel.__new__ = staticmethod(__new__)  # type: ignore[method-assign, assignment]
    _guard()


def _is_pruned(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig) and bool(value.__dict__.get(KEY))


def _meet(cls: type[PreTrainedModel], config: Any) -> None:
    """Wrap the class so that it builds the sizes of a config; raise ValueError for sizes that cannot be."""
    if needs_loader(config):
        if MARK not in cls.__dict__:
            _wrap_init(cls)
    elif config.__dict__[KEY].get("format") == FORMAT and "dense" in config.__dict__[KEY]:
        check_sizes(config)


def _wrap_init(cls: Any) -> None:
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        config = next((value for value in (*args, *kwargs.values()) if _is_pruned(value)), None)
        if config is None:
            return init(self, *args, **kwargs)

        def stock(shown: Any) -> None:
            """The class's own `__init__`, with another config in the place of the pruned one."""
            seen = [shown if value is config else value for value in args]
            init(self, *seen, **{key: shown if value is config else value for key, value in kwargs.items()})

        return build_(self, stock, config)

    cls.__init__ = __init__
    setattr(cls, MARK, True)


def _guard() -> None:
    """Refuse a pruned config that `__new__` did not see (a subclass can hide it): it would be built dense."""
    init: Any = PreTrainedModel.__init__
    if hasattr(init, MARK):
        return

    @functools.wraps(init)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if _is_pruned(config) and needs_loader(config):
            raise ValueError(
                f"{type(self).__name__} got the config of a pruned model in a way that hf_prune does not see, and "
                "would build it dense. Hand the config to the class itself, as from_pretrained does."
            )
        init(self, config, *args, **kwargs)

    setattr(__init__, MARK, True)
    PreTrainedModel.__init__ = __init__  # type: ignore[method-assign]
