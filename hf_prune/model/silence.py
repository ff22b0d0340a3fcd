"""Parts of a live model made silent, as if they were cut: columns that read zeros, experts that no token is sent to,
layers that hand their input on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .axes import Part
from .cut import aligned, index_of
from .offload import replaced
from .sites import Site, module_of, tensor_of

PRODUCTS = (functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


@contextlib.contextmanager
def without(layer: nn.Module, site: Site, left: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """A layer in which these units of a site's axes alone are heard."""
    with contextlib.ExitStack() as stack:
        for part in site.parts:
            if part.role in ("reads", "routes"):
                kept = _kept(part, left, site).to(tensor_of(layer, part.tensor).device)
                stack.enter_context((closed if part.role == "routes" else zeroed)(layer, part.tensor, kept, part.dim))
        yield


def _kept(part: Part, left: Mapping[str, Sequence[int]], site: Site) -> torch.Tensor:
    """Whether each entry along a part's dimension remains, [n]; within another axis for each of its units, [G, n]."""
    index = index_of(part, left, site.sizes, site.widths)
    entries = sum(part.along(axis, site.sizes) * part.entries(axis, site.widths) for axis in part.axes)
    if not part.within:
        return torch.zeros(entries, dtype=torch.bool).index_fill_(0, index, True)
    kept = torch.zeros(site.sizes[part.within], entries, dtype=torch.bool)
    kept[torch.tensor(left[part.within])[:, None], index] = True
    return kept


@contextlib.contextmanager
def zeroed(root: nn.Module, path: str, kept: torch.Tensor, dim: int) -> Iterator[None]:
    """A tensor with zeros wherever an entry along a dimension is not kept, [n] or [G, n]."""
    tensor = tensor_of(root, path)
    before = tensor.data
    tensor.data = before * aligned(kept, tensor.dim(), dim)
    try:
        yield
    finally:
        tensor.data = before


@contextlib.contextmanager
def closed(root: nn.Module, path: str, kept: torch.Tensor, dim: int) -> Iterator[None]:
    """A router, or what is added to its logits, by which no token chooses an expert that is not kept, [n]."""
    tensor, module = tensor_of(root, path), root.get_submodule(module_of(path))
    if tensor.numel() == len(kept):
        before = tensor.data
        tensor.data = before.masked_fill(~aligned(kept, tensor.dim(), dim), float("-inf"))
        try:
            yield
        finally:
            tensor.data = before
        return
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Closed(kept):
            return original(*args, **kwargs)

    with replaced(module, forward):
        yield


class _Closed(TorchFunctionMode):
    """Every product with as many columns as there are experts gives -inf for those that are closed."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in PRODUCTS and found.shape[-1] == len(self.kept):
            return found.masked_fill(~self.kept, float("-inf"))
        return found


@contextlib.contextmanager
def skipped(layer: nn.Module) -> Iterator[None]:
    """A layer that hands its hidden states on as they came."""
    first = next(iter(inspect.signature(layer.forward).parameters))

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs[first]
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = layer.register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
