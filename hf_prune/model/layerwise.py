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
from .patched import computing
from .shelf import Shelf, Shelved

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

    states: Shelved
    kwargs: list[list[Kwargs]]  # [layer][batch]
    loops: int = 1  # times that a model runs its layers

    def copy(self) -> Stream:
        return Stream(self.states.shelf.list(self.states), self.kwargs, self.loops)

    def spread(self, values: Sequence[Value]) -> list[Value]:
        """A value of each batch, as often as the layers are run on it."""
        return [value for value in values for _ in range(self.loops)]


@torch.no_grad()
def capture(
    model: nn.Module, layers: Sequence[nn.Module], batches: Sequence[Mapping[str, Any]], shelf: Shelf | None = None
) -> Stream:
    """Run the model up to the last of `layers` and keep what enters the first, and every layer's other arguments.

    The first batch is run to the end, which shows whether layers are run again; and once more with layers that hand on
    what they are given. Where they are called with the same arguments then, the other batches skip them, too.
    """
    record = _Record([inspect.signature(layer.forward) for layer in layers], (shelf or Shelf()).list())
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(record.hook(index), with_kwargs=True).remove)
        for number, batch in enumerate(batches):
            with contextlib.suppress(_Stop):
                model(**batch)
            if number == 0:
                record.loops = len(record.states)
                if record.loops == 1 and len(batches) > 1 and record.depends_on_no_layer(model, layers, batch):
                    stack.enter_context(_handing_on(layers))
    return Stream(record.states, record.kwargs, max(record.loops, 1))


class _Record:
    """What enters the first layer, and the other arguments of all: see `Stream`."""

    def __init__(self, signatures: Sequence[inspect.Signature], states: Shelved) -> None:
        self.signatures = signatures
        self.states = states
        self.kwargs: list[list[Kwargs]] = [[] for _ in signatures]
        self.loops = 0  # not known yet

    def hook(self, index: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], named: Kwargs) -> None:
            arguments = dict(self.signatures[index].bind(*args, **named).arguments)
            hidden = arguments.pop(next(iter(self.signatures[index].parameters)))
            arguments.update(arguments.pop("kwargs", {}))
            self.kwargs[index].append(arguments)
            if index == 0:
                self.states.append(hidden)
            if index == len(self.signatures) - 1 and self.loops == 1:
                raise _Stop

        return keep

    def depends_on_no_layer(self, model: nn.Module, layers: Sequence[nn.Module], batch: Mapping[str, Any]) -> bool:
        """Whether the layers get the same arguments where none of them computes anything; the first batch again."""
        try:
            with _handing_on(layers), contextlib.suppress(_Stop):
                model(**batch)
            return len(self.states) == 2 and all(len(each) == 2 and _alike(*each) for each in self.kwargs)
        except Exception:  # whatever a model says to layers that give other values
            return False
        finally:
            while len(self.states) > 1:
                self.states.pop()
            for each in self.kwargs:
                del each[1:]


@contextlib.contextmanager
def _handing_on(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that give the hidden states that they get."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            first = next(iter(inspect.signature(layer.forward).parameters))
            stack.enter_context(computing(layer, partial(_first_of, first)))
        yield


def _first_of(name: str, *args: Any, **named: Any) -> Any:
    return args[0] if args else named[name]


def _alike(a: Any, b: Any) -> bool:
    """Equal, and in the same order where they hold several."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_alike, a, b))
    return a is b or (isinstance(a, int | float | str) and a == b)


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
