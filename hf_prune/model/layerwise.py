"""Run a stack one layer at a time over cached hidden states, so that no layer is ever run from the bottom again.

Shapes: B examples, T tokens, D hidden width.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from .experts import is_known

Kwargs = dict[str, Any]
Value = TypeVar("Value")
OUTPUT = ""  # the layer's own output among what `run` has seen


class _Stop(Exception):
    """Raised by a hook that has what it came for."""


@dataclass
class Stream:
    """Hidden states [B, T, D] per batch in front of a layer, and what each layer is called with besides them.

    Where a model runs its layers several times (ALBERT), each time counts as a batch of its own.
    """

    states: list[torch.Tensor]
    kwargs: list[list[Kwargs]]  # [layer][batch]
    loops: int = 1  # times that a model runs its layers

    def copy(self) -> Stream:
        return Stream(list(self.states), self.kwargs, self.loops)

    def spread(self, values: Sequence[Value]) -> list[Value]:
        """A value of each batch, as often as the layers are run on it."""
        return [value for value in values for _ in range(self.loops)]


@torch.no_grad()
def capture(model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]]) -> Stream:
    """Run the model up to the last of `layers` and keep what enters the first, and every layer's other arguments.

    The first batch is run to the end, which shows whether layers are run again.
    """
    states: list[torch.Tensor] = []
    loops = 0  # not known yet
    kwargs: list[list[Kwargs]] = [[] for _ in layers]

    def record(index: int) -> Any:
        signature = inspect.signature(layers[index].forward)

        def hook(module: nn.Module, args: tuple[Any, ...], named: Kwargs) -> None:
            arguments = dict(signature.bind(*args, **named).arguments)
            first = next(iter(signature.parameters))
            hidden = arguments.pop(first)
            arguments.update(arguments.pop("kwargs", {}))
            kwargs[index].append(arguments)
            if index == 0:
                states.append(hidden)
            if index == len(layers) - 1 and loops == 1:
                raise _Stop

        return hook

    handles = [layer.register_forward_pre_hook(record(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for batch in batches:
            with contextlib.suppress(_Stop):
                model(**batch)
            loops = loops or len(states)
    finally:
        for handle in handles:
            handle.remove()
    return Stream(states, kwargs, max(loops, 1))


@torch.no_grad()
def run(
    layer: nn.Module,
    hidden: torch.Tensor,
    kwargs: Kwargs,
    inputs_of: Sequence[str] = (),
    outputs_of: Sequence[str] = (),
    stop_at: str | None = None,
) -> dict[str, Any]:
    """One layer on one batch: what `observed` sees of it."""
    return observed(layer, partial(layer, hidden, **kwargs), inputs_of, outputs_of, stop_at)


@torch.no_grad()
def observed(
    layer: nn.Module,
    call: Callable[[], Any],
    inputs_of: Sequence[str] = (),
    outputs_of: Sequence[str] = (),
    stop_at: str | None = None,
) -> dict[str, Any]:
    """The asked inputs and outputs of submodules by path, in the order in which they come, and what the call gives
    under `OUTPUT`. Of experts all inputs: tokens, which of them they are sent to, by what weights.

    With `stop_at` it is left as soon as that path has been recorded, before it has an output.
    """
    seen: dict[str, Any] = {}
    with contextlib.ExitStack() as hooks:
        for path in inputs_of:
            hooks.enter_context(_tap_input(layer.get_submodule(path), path, seen, path == stop_at))
        for path in outputs_of:
            hooks.enter_context(_tap_output(layer.get_submodule(path), path, seen, path == stop_at))
        with contextlib.suppress(_Stop):
            output = call()
            seen[OUTPUT] = output if isinstance(output, torch.Tensor) else output[0]
    return seen


@contextlib.contextmanager
def _tap_input(module: nn.Module, path: str, seen: dict[str, Any], stop: bool) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], named: Kwargs) -> None:
        given = (*args, *named.values())
        seen[path] = given if is_known(module) else given[0]
        if stop:
            raise _Stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _tap_output(module: nn.Module, path: str, seen: dict[str, Any], stop: bool) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        seen[path] = output
        if stop:
            raise _Stop

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
