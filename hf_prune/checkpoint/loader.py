"""The loader: transformers builds pruned checkpoints to the sizes that their config means."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .layout import FORMAT, HOME, KEY, build_, check_sizes, needs_loader

MARK = "_hf_prune_loader"  # on what this file has put in place


def install_loader() -> None:
    """Teach transformers to build the shapes that a pruned config means; runs at `import hf_prune`.

    `PreTrainedModel.__new__` is the one door that every construction passes; another library that stands there already
    is asked next. A class that meets a pruned config there has its `__init__` wrapped, once; all others are left alone.
    The config shows dense sizes and no `per_layer_config` while the stock class builds, so this stays right when
    transformers ships its own modelling half. What came by another road is refused where all roads meet.
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
            made.__dict__[HOME] = str(Path(config._name_or_path).resolve())  # also after a change of directory
        return made

    setattr(__new__, MARK, True)
    PreTrainedModel.__new__ = staticmethod(__new__)  # type: ignore[method-assign, assignment]
    _guard()


def _is_pruned(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig) and bool(value.__dict__.get(KEY))


def _meet(cls: type[PreTrainedModel], config: Any) -> None:
    """Raise ValueError for sizes that cannot be meant, and see to it that the class builds the others."""
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
            """The class's own, shown another config in the place of ours."""
            seen = [shown if value is config else value for value in args]
            init(self, *seen, **{key: shown if value is config else value for key, value in kwargs.items()})

        return build_(self, stock, config)

    cls.__init__ = __init__
    setattr(cls, MARK, True)


def _guard() -> None:
    """A pruned config that no wrapped class has met (a subclass that hides it from `__new__`) is not built dense."""
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
