"""A narrower stream: what is left of the dense one, and an adapter from it to what its readers expect.

A reader W of the dense stream reads A·z of the narrow one: A is the least-squares map from what it is given now to what
it reads in the dense model, rectangular, and folded into W. What writes to the stream keeps its rows of the channels
that stay. A norm over fewer channels has other statistics: its scale and shift are refitted.

Shapes: B examples, T tokens, n real tokens, D channels of the dense stream, S of the narrow one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.along import cut_along_, cut_wide_
from ..model.cut import put_, say_sizes_
from ..model.layerwise import OUTPUT, observed
from ..model.offload import device_of, real, tie_again_
from ..model.sites import Extent, input_axis, module_of, tensor_of
from ..score.statistics import rows_of
from .solve import RIDGES, ChannelSums, Moments, fold, refit, refit_channels

FINER = (1e-5, 1e-4, *RIDGES)  # ridges of an adapter: a few channels of a stream hold most of its energy


@dataclass(frozen=True)
class Channels:
    """The channels of the stream that stay, and the tensors that they run along."""

    extent: Extent
    kept: tuple[int, ...]

    def of(self, dense: torch.Tensor) -> torch.Tensor:
        """The channels that stay, [..., D] -> [..., S]."""
        return dense[..., list(self.kept)]

    def inside(self, path: str) -> Channels:
        """What lies in a module of the model, by path in it."""
        prefix, extent = f"{path}.", self.extent
        parts = (part for part in extent.parts if part.tensor.startswith(prefix))
        attributes = (name for name in extent.attributes if name.startswith(prefix))
        return Channels(
            replace(
                extent,
                parts=tuple(replace(part, tensor=part.tensor.removeprefix(prefix)) for part in parts),
                attributes=tuple(name.removeprefix(prefix) for name in attributes),
            ),
            self.kept,
        )

    def readers(self) -> set[str]:
        """The modules whose columns the channels are."""
        return {module_of(part.tensor) for part in self.extent.parts if part.role == "reads"}

    def cut_(self, model: nn.Module, wanted: Callable[[str], bool], adapted: Iterable[str] = ()) -> None:
        """Slice what belongs to modules that are wanted, but the columns of those that an adapter is folded into."""
        later, extent = {*adapted}, self.extent
        parts = (part for part in extent.parts if wanted(module_of(part.tensor)))
        some = tuple(p for p in parts if p.role != "reads" or module_of(p.tensor) not in later)
        attributes = tuple(path for path in extent.attributes if wanted(module_of(path)))
        silent = replace(extent, parts=some, attributes=attributes, axis=replace(extent.axis, config="", also=()))
        cut_along_(model, silent, self.kept)
        for path in attributes:
            setattr(model.get_submodule(module_of(path)), path.rpartition(".")[2], len(self.kept))

    def tell_(self, model: nn.Module) -> None:
        """Make the configs say the new width."""
        cut_wide_(model, replace(self.extent, parts=(), attributes=()), self.kept)

    def moments(self, has_bias: bool, device: torch.device) -> Moments:
        """For the regression of the dense stream on the narrow one."""
        return Moments(self.extent.of, len(self.kept), has_bias, device)

    def adapter(self, sums: Sequence[Moments], solves: bool) -> torch.Tensor:
        """The map from the narrow stream to the dense one [D, S], with an offset as last column where the sums have
        one. Where no other is better on every held-out set, each channel is but scaled, or, without `solves`, handed
        on.

        Args:
            sums: of the rows that it is fitted to, then of each held-out set.
        """
        first = sums[0]
        plain = torch.zeros_like(first.own)
        here = torch.arange(len(self.kept), device=plain.device)
        plain[list(self.kept), here] = 1.0
        if not solves:
            return plain
        scaled = plain.clone()
        scale = first.own[list(self.kept), here] / first.gram.diagonal()[here].clamp_min(1e-12)
        scaled[list(self.kept), here] = scale
        errors = [(moments.error(scaled), moments.error(plain)) for moments in sums[1:] if moments.tokens]
        start = scaled if errors and all(after < before for after, before in errors) else plain
        return refit(start, first, sums[1:], (0.0,), FINER).weight.float()


def matrix_of(linear: Any) -> torch.Tensor:
    """Weight [D, K] of a linear module or convolution in fp32, with the bias as last column where there is one."""
    with real(linear):
        weight = linear.weight.detach().float()
        weight = weight.T if input_axis(linear) == 0 else weight.flatten(1)
        return weight.clone() if linear.bias is None else torch.cat([weight, linear.bias.detach().float()[:, None]], 1)


def set_matrix_(linear: Any, matrix: torch.Tensor) -> None:
    """Put back what `matrix_of` gave, of other columns or rows too, in the weight's own dtype."""
    kernel = linear.weight.shape[2:]  # of a convolution
    weight = matrix if linear.bias is None else matrix[:, :-1]
    if kernel:
        weight = weight.unflatten(1, (-1, *kernel))
    with real(linear):
        if linear.bias is not None:
            put_(linear, "bias", matrix[:, -1])
        put_(linear, "weight", weight.T if input_axis(linear) == 0 else weight)
    say_sizes_(linear)


def fold_(modules: Iterable[Any], adapter: torch.Tensor, offset: bool) -> None:
    """Make modules read x as they read the adapted x."""
    for module in modules:
        set_matrix_(module, fold(matrix_of(module), adapter, offset))


# --- outside the layers ----------------------------------------------------------------------------------------------


@dataclass
class Outside:
    """Norms and readers of the stream outside the layers (embeddings, final norm, pooler, head), in the order in which
    the model runs them, with what they give and read in the dense model."""

    model: nn.Module
    channels: Channels
    layers: str  # path of the list of layers
    inputs: Sequence[Mapping[str, Any]]
    masks: Sequence[torch.Tensor | None]  # [B*T] a batch
    held_out: Sequence[torch.Tensor]  # [B] a batch, see `StackRepair`
    solves: bool = True  # False: channels are only handed on
    norm_offset: float = 0.0
    dense: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    in_front: set[str] = field(default_factory=set)  # those that run before the first layer
    readers: set[str] = field(default_factory=set)  # those that an adapter is folded into

    def is_outside(self, module: str) -> bool:
        return not module.startswith(f"{self.layers}.")

    def watch(self) -> None:
        """See what they give and read while the model is whole."""
        tie_again_(self.model)
        first, self.readers = f"{self.layers}.0", self._adapted()
        norms = list(filter(self.is_outside, self._norms()))
        for inputs in self.inputs:
            seen = observed(self.model, partial(self.model, **inputs), [*self.readers, first], norms)
            seen.pop(OUTPUT)
            order = [*seen]
            self.in_front = {*order[: order.index(first)]}
            for path in (path for path in order if path != first):
                self.dense.setdefault(path, []).append(seen[path])

    def _norms(self) -> list[str]:
        parts = (part for part in self.channels.extent.parts if part.tensor.endswith(".weight"))
        return [module_of(p.tensor) for p in parts if tensor_of(self.model, p.tensor).dim() == 1]

    def _adapted(self) -> set[str]:
        """The readers that have a matrix to themselves: not a head that shares it with the embeddings."""
        shared = {id(tensor_of(self.model, p.tensor)) for p in self.channels.extent.parts if p.role == "carries"}
        outside = filter(self.is_outside, self.channels.readers())
        return {path for path in outside if id(tensor_of(self.model, f"{path}.weight")) not in shared}

    def start_(self) -> None:
        """Slice all but the columns of the readers, and refit what runs before the first layer."""
        self.channels.cut_(self.model, self.is_outside, self.readers)
        self._repair_(in_front=True)

    def finish_(self) -> None:
        """Refit what runs behind the layers, and make the configs say the new width."""
        self._repair_(in_front=False)
        self.channels.tell_(self.model)

    def _repair_(self, in_front: bool) -> None:
        """Refit those on one side of the layers, one after the other."""
        for path in [path for path in self.dense if (path in self.in_front) == in_front]:
            if path in self.readers:
                self._adapt_(path)
            elif self.solves:
                self._refit_norm_(path)
        for path in () if in_front else self.readers - {*self.dense}:  # that no row reaches
            fold_([self.model.get_submodule(path)], self.channels.adapter(self._sums(path), False), self._bias(path))

    def _bias(self, path: str) -> bool:
        return getattr(self.model.get_submodule(path), "bias", None) is not None

    def _sums(self, path: str) -> list[Moments]:
        device = device_of(self.model.get_submodule(path))
        sets = 1 + max(int(held_out.max()) for held_out in self.held_out)
        return [self.channels.moments(self._bias(path), device) for _ in range(sets)]

    def _adapt_(self, path: str) -> None:
        sums = self._sums(path)
        for number, x, y in self._rows(path, {path}, self.channels.extent.of) if self.solves else ():
            sums[number].add(x, y, torch.zeros_like(y))
        fold_([self.model.get_submodule(path)], self.channels.adapter(sums, self.solves), self._bias(path))

    def _refit_norm_(self, path: str) -> None:
        norm: Any = self.model.get_submodule(path)
        sets = 1 + max(int(held_out.max()) for held_out in self.held_out)
        sums = [ChannelSums(len(norm.weight), device_of(norm)) for _ in range(sets)]
        for number, x, y in self._rows(path, set(), self.channels.extent.of):
            sums[number].add(x, self.channels.of(y))
        rescale_norm_(
            norm, refit_channels(sums[0], sums[1:], getattr(norm, "bias", None) is not None), self.norm_offset
        )

    def _rows(self, path: str, inputs_of: set[str], width: int) -> Iterable[tuple[int, torch.Tensor, torch.Tensor]]:
        """By set of examples: the rows of the narrow model [n, S] and of the dense one [n, D]."""
        for batch, inputs in enumerate(self.inputs):
            asked = ([path], []) if path in inputs_of else ([], [path])
            narrow = observed(self.model, partial(self.model, **inputs), *asked, stop_at=path)[path]
            dense, mask = self.dense[path][batch], self.masks[batch]
            fits = mask is not None and mask.numel() * width == dense.numel()
            for number in self.held_out[batch].unique().tolist():
                some = self.held_out[batch] == number
                x, y = (rows_of(value, mask if fits else None, some) for value in (narrow, dense))
                yield number, x, y


def rescale_norm_(norm: Any, found: tuple[torch.Tensor, torch.Tensor] | None, offset: float) -> bool:
    """Put a scale and a shift of each channel behind a norm, where they were found.

    Args:
        offset: the norm computes x * (offset + weight).
    """
    if found is None:
        return False
    scale, shift = found
    with real(norm):
        put_(norm, "weight", scale * (norm.weight + offset) - offset)
        if getattr(norm, "bias", None) is not None:
            put_(norm, "bias", scale * norm.bias + shift)
    return True


def first_states(model: nn.Module, layer: str, inputs: Sequence[Mapping[str, Any]]) -> Iterator[torch.Tensor]:
    """The stream in front of a layer, of each batch."""
    return (observed(model, partial(model, **each), [layer], stop_at=layer)[layer] for each in inputs)
