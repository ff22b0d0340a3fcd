"""The prunable places of a live model: family rows resolved on its modules, sized by its weights.

Shapes: U units of an axis, D hidden width.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .axes import STEM, Axis, Family, Part, Stack, Sublayer
from .configs import raw

Where = tuple[Any, ...]  # (stack, layer, kind) of a site, (stack,) of its layers, () of the model
Counts = Mapping[str, int]  # axis -> units


@dataclass(frozen=True)
class Site:
    """A sublayer of a live model: its axes, outermost first, with their sizes, and the tensors that they run along."""

    stack: str
    layer: int
    kind: str
    path: str  # of the layer in the model
    row: Sublayer
    sizes: Counts
    widths: Counts  # axis -> entries of a unit
    parts: tuple[Part, ...]  # those of the row that are here
    shapes: Mapping[str, tuple[int, ...]]  # of the parameters among their tensors
    active: bool = True  # False: this model never runs it (cross-attention of a lone decoder)
    has_bias: bool = False  # of the consumer
    routed: int = 0  # units of `outer` that each token goes through; 0: all of them
    multiple: int = 1  # units of `inner` for each that the config counts
    split: int = 1  # groups of as many units of `outer` each, of which none may have more than another
    applied: Mapping[str, int] = field(default_factory=dict)  # tensor -> positions that it is applied at: of an image,
    # where layers work on maps of pixels; in a stem for each token
    elsewhere: frozenset[str] = frozenset()  # tensors whose cost an earlier site of the layer counts, see `Crossing`

    @property
    def key(self) -> Where:
        return (self.stack, self.layer, self.kind)

    @property
    def name(self) -> str:
        return f"{self.stack} layer {self.layer} {self.kind}"

    @property
    def is_stem(self) -> bool:
        return self.stack == STEM

    @property
    def inner(self) -> Axis:
        """The axis that the consumer's inputs run along."""
        return self.row.axes[-1]

    @property
    def outer(self) -> Axis:
        """The axis whose units hold several of `inner`; where there is none, `inner` itself."""
        return self.row.axes[0]

    @property
    def share(self) -> int:
        """Units of `inner` in each of `outer`."""
        return self.sizes[self.inner.name] // self.sizes[self.outer.name]

    @property
    def consumer(self) -> str:
        """The module whose input columns the units are."""
        return module_of(self._read.tensor)

    @property
    def _read(self) -> Part:
        return next(part for part in self.parts if part.role == "reads")

    @property
    def columns(self) -> int:
        """Input columns of the consumer."""
        return self.shapes[self._read.tensor][self._read.dim]

    @property
    def hidden(self) -> int:
        """Width of the stream that the consumer adds to."""
        along = {part.dim for part in self.parts if part.tensor == self._read.tensor}
        return next(size for dim, size in enumerate(self.shapes[self._read.tensor]) if dim not in along)

    def axis(self, name: str) -> Axis | None:
        """The axis of this name, or the one that it is another word for."""
        return next((axis for axis in self.row.axes if name in (axis.name, axis.alias)), None)

    def along_with(self, axis: str) -> set[str]:
        """The axes whose units go with a unit of this one: what it holds, and what holds nothing else."""
        alone = axis == self.inner.name and self.share > 1
        return {axis} if alone else {self.outer.name, self.inner.name}

    def counts(self, groups: int, each: int) -> Counts:
        """The sizes with so many units of `outer`, and so many of `inner` in each of them."""
        return {self.outer.name: groups, self.inner.name: groups * each}

    def expand(self, axis: str, kept: Sequence[int]) -> dict[str, list[int]]:
        """What remains of every axis when these units of one do.

        Raises:
            ValueError: units that leave the remaining ones of the parent with different numbers.
        """
        outer, inner, share = self.outer.name, self.inner.name, self.share
        if outer != inner and axis == outer:
            return {outer: list(kept), inner: [group * share + j for group in kept for j in range(share)]}
        each = Counter(unit // share for unit in kept)
        if len({*each.values()}) > 1:
            raise ValueError(
                f"{self.name}: all remaining {outer} must keep the same number of {inner}, got {list(kept)}."
            )
        return {outer: sorted(each), inner: list(kept)}

    @property
    def values(self) -> dict[str, int]:
        """The config values that describe the sizes."""
        return self.said(self.sizes)

    def said(self, counts: Counts) -> dict[str, int]:
        """The config values that describe so many units."""
        outer = max(counts[self.outer.name], 1)
        return {
            key: counts[axis.name] // (outer if axis.each else self.multiple if axis.multiple else 1)
            for axis in self.row.axes
            for key in (axis.config, *axis.also)
        }

    def resized(self, counts: Counts) -> Site:
        """The site with so many units."""
        shapes = {tensor: [*shape] for tensor, shape in self.shapes.items()}
        for part in self.parts:
            if part.tensor in shapes:
                entries = sum(part.along(axis, counts) * part.entries(axis, self.widths) for axis in part.axes)
                shapes[part.tensor][part.dim] = entries
        return replace(self, sizes=dict(counts), shapes={tensor: tuple(shape) for tensor, shape in shapes.items()})

    @cached_property
    def _products(self) -> tuple[tuple[int, int, bool, bool, tuple[tuple[Part, Mapping[str, float]], ...]], ...]:
        """Of each tensor: its elements, how often it is applied, whether it is a matrix, whether a token goes through a
        part of it alone, and of each of its dimensions the share of a unit."""
        found = []
        here = (part.tensor for part in self.parts if part.tensor in self.shapes)
        for tensor in dict.fromkeys(name for name in here if name not in self.elsewhere):
            along = [part for part in self.parts if part.tensor == tensor]
            shape, roles = self.shapes[tensor], {part.role for part in along}
            is_matrix = roles != {"carries"} and math.prod(shape) > max(shape)
            in_turn = bool(self.routed) and "routes" not in roles
            dims = tuple((part, self._shares(part)) for part in along)
            found.append((math.prod(shape), self.applied.get(tensor, 1), is_matrix, in_turn, dims))
        return tuple(found)

    def _shares(self, part: Part) -> dict[str, float]:
        entries = {axis: part.entries(axis, self.widths) for axis in part.axes}
        total = max(sum(part.along(axis, self.sizes) * entries[axis] for axis in part.axes), 1)
        return {axis: part.axes.count(axis) * entries[axis] / total for axis in entries}

    def fits(self, counts: Counts, width: int) -> bool:
        """Whether the stock class can say so many units beside a stream of this width."""
        axis, units = self.inner, counts[self.inner.name]
        if not axis.mixes or axis.stock == "any":
            return True
        return width % units == 0 if axis.stock == "divisors" else units * self.widths[axis.name] == width

    def elements(self, counts: Counts, matrices: bool = False) -> float:
        """Elements of all parameters with so many units: a product over their dimensions. `matrices`: of those of
        matrices that a token goes through, as often as they are applied."""
        through = min(self.routed / max(counts[self.outer.name], 1), 1)
        return sum(
            (size * applied if matrices else size)
            * math.prod(sum(part.along(a, counts) * share for a, share in shares.items()) for part, shares in dims)
            * (through if matrices and in_turn else 1)
            for size, applied, is_matrix, in_turn, dims in self._products
            if is_matrix or not matrices
        )

    def compared(self, counts: Counts) -> float:
        """Columns that a token is compared by, and what is summed over: multiply-adds for each pair of tokens."""
        return sum(2 * counts[axis.name] * self.widths[axis.name] for axis in self.row.axes if axis.mixes)


@dataclass(frozen=True)
class Extent:
    """An axis of a stack or of the whole model: how many units there are, and where they lie in the model."""

    where: Where
    axis: Axis
    of: int
    path: str = ""  # of the list of layers; of a stem that of the module
    parts: tuple[Part, ...] = ()  # of an axis that runs through the whole model, such as the vocabulary, by path in it
    attributes: tuple[str, ...] = ()  # of modules, which repeat its number of units
    never: tuple[int, ...] = ()  # numbers of units of which the class would build another model

    @property
    def is_stem(self) -> bool:
        return self.where == (STEM,)

    @property
    def layers(self) -> list[str]:
        """The paths of the layers."""
        return [self.path] if self.is_stem else [f"{self.path}.{index}" for index in range(self.of)]

    @property
    def is_wide(self) -> bool:
        """Whether it runs through the whole model, and is no vocabulary, whose ids have to follow."""
        return bool(self.parts) and self.where != ()


def module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


# --- resolving a row -------------------------------------------------------------------------------------------------


def find_sites(model: Any, family: Family) -> list[Site]:
    """Sites of all stacks that this model class has, in the order in which the model runs them."""
    if getattr(model.config, "add_cross_attention", False) and not model.config.is_encoder_decoder:
        raise ValueError(
            f"add_cross_attention=True on {family.model_type!r}: cross-attention is only known for "
            "encoder-decoder families. Prune the encoder and the decoder before you join them."
        )
    stacks = live_stacks(model, family)
    if family.layered.stacks and all(stack.is_stem for stack, _ in stacks):
        wanted = ", ".join(stack.layers for stack in family.layered.stacks)
        raise ValueError(f"{type(model).__name__}: none of the layer paths of the {family.model_type} row ({wanted}).")
    names = {stack.name for stack, _ in stacks}
    found = [
        _site(layer, path, stack.name, index, _placed(row, family, model.config), names, model.config)
        for stack, at in stacks
        for index, path in enumerate(_extent(model, stack, at).layers)
        for layer in [model.get_submodule(path)]
        for row in stack.sublayers
        if not row.optional or _has(layer, row)
    ]
    return list(_each_counted_once(found))


def _each_counted_once(sites: Sequence[Site]) -> Iterator[Site]:
    """The sites, each with the matrices that one before it in its layer has too: a convolution between two others,
    whose inputs are units of the one, and whose outputs are units of the other."""
    known: dict[str, set[str]] = {}  # path of a layer -> matrices
    for site in sites:
        before = known.setdefault(site.path, set())
        matrices = {part.tensor for part in site.parts if part.role != "carries"}
        yield replace(site, elsewhere=frozenset(before & matrices))
        before |= matrices


def find_stacks(model: Any, family: Family) -> tuple[Extent, ...]:
    """The stacks of a model."""
    return tuple(_extent(model, stack, path) for stack, path in live_stacks(model, family))


def _extent(model: Any, stack: Stack, path: str) -> Extent:
    return Extent((stack.name,), stack.axis, 1 if stack.is_stem else len(model.get_submodule(path)), path)


def live_stacks(model: Any, family: Family) -> list[tuple[Stack, str]]:
    """The stacks that this class has (T5EncoderModel and BartForCausalLM have one), and the paths of their layers."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for stack in stacks_of(model.config, family):
        with contextlib.suppress(AttributeError):
            found.append((stack, names[id(model.base_model.get_submodule(stack.layers))]))
    return found


def stacks_of(config: Any, family: Family) -> list[Stack]:
    """The stacks whose units can go in models of this config."""
    return [stack for stack in family.stacks if stack.only is None or raw(config, stack.only[0]) == stack.only[1]]


def refused_by(config: Any, family: Family) -> Family:
    """The row which also says what must stay in models of this config, and why."""
    here = stacks_of(config, family)
    why = {
        axis.name: stack.only[2]
        for stack in family.stacks
        if stack.only and stack not in here
        for row in stack.sublayers
        for axis in row.axes
    }
    return replace(family, refused=(*family.refused, *why.items()))


def _placed(row: Sublayer, family: Family, config: Any) -> Sublayer:
    """The row with its norm behind the sum where this model's config wants it there (OPT-350m)."""
    key = family.post_norm_unless
    return replace(row, norm_place="after") if key and row.norm and not getattr(config, key) else row


def _site(layer: nn.Module, path: str, stack: str, index: int, row: Sublayer, stacks: set[str], config: Any) -> Site:
    parts = _parts_here(layer, row)
    tensors = {part.tensor: tensor_of(layer, part.tensor) for part in parts}
    widths = {axis.name: _width(attribute_of(layer, axis.width)) if axis.width else 1 for axis in row.axes}
    widths |= {p.width: sum(attribute_of(layer, each) for each in p.width.split("+")) for p in parts if p.width}
    sizes = _sizes(parts, {path: tuple(tensor.shape) for path, tensor in tensors.items()}, widths)
    shapes = {path: tuple(tensor.shape) for path, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
    active = all(part.source in (*stacks, "") for part in parts)
    outer, inner = row.axes[0], row.axes[-1]
    routed, multiple, split = (raw(config, key) if key else 0 for key in (outer.routed, inner.multiple, outer.split))
    return Site(
        stack,
        index,
        row.kind,
        path,
        row,
        sizes,
        widths,
        parts,
        shapes,
        active,
        has_bias=_consumer_bias(layer, parts),
        routed=routed,
        multiple=multiple or 1,
        split=split or 1,
    )


def _width(found: Any) -> int:
    return found.shape[1] if isinstance(found, torch.Tensor) else int(found)


def _has(layer: nn.Module, row: Sublayer) -> bool:
    """Whether a layer has a sublayer that not every layer has: all that reads its units is there."""
    return all(find_tensor(layer, part.tensor) is not None for part in row.parts if part.role == "reads")


def _consumer_bias(layer: nn.Module, parts: Sequence[Part]) -> bool:
    consumer = next((module_of(part.tensor) for part in parts if part.role == "reads"), None)
    return consumer is not None and find_tensor(layer, f"{consumer}.bias") is not None


def _parts_here(layer: nn.Module, row: Sublayer) -> tuple[Part, ...]:
    """The parts of a row whose tensors this layer has.

    Raises:
        ValueError: one is missing that every model of the family has, or nothing makes the units of an axis.
    """
    here = tuple(part for part in row.parts if find_tensor(layer, part.tensor) is not None)
    missing = [part.tensor for part in row.parts if part not in here and not part.optional]
    made = {axis for part in here if part.role == "makes" for axis in part.axes}
    missing += [f"{axis.name} of {row.kind}" for axis in row.axes if axis.name not in made]
    if missing:
        raise ValueError(f"{type(layer).__name__} has no {missing[0]!r}: the family row does not fit this model.")
    return here


def _sizes(parts: Sequence[Part], shapes: Mapping[str, tuple[int, ...]], widths: Counts) -> dict[str, int]:
    """Units of every axis, from the tensors that it has for itself, then from those that it shares.

    Raises:
        ValueError: a tensor that whole units do not make up.
    """
    sizes: dict[str, int] = {}
    for part in sorted(parts, key=lambda part: (bool(part.within), len(set(part.axes)))):
        known = sum(part.along(axis, sizes) * part.entries(axis, widths) for axis in part.axes if axis in sizes)
        unknown = {axis for axis in part.axes if axis not in sizes}
        if len(unknown) == 1:
            axis = unknown.pop()
            columns = (shapes[part.tensor][part.dim] - known) // part.axes.count(axis)
            sizes[axis] = columns // part.entries(axis, widths) * (sizes[part.within] if part.within else 1)
    for part in parts:
        entries = sum(part.along(axis, sizes) * part.entries(axis, widths) for axis in part.axes if axis in sizes)
        if entries != shapes[part.tensor][part.dim]:
            raise ValueError(
                f"{part.tensor} has {shapes[part.tensor]} entries, where {sizes} of {widths} columns make {entries} "
                f"along dimension {part.dim}: the family row does not fit this model."
            )
    return sizes


# --- tensors and modules by path -------------------------------------------------------------------------------------


def find_tensor(module: nn.Module, path: str) -> torch.Tensor | None:
    """A parameter or buffer by path; None where there is none."""
    owner, _, name = path.rpartition(".")
    with contextlib.suppress(AttributeError):
        found = getattr(module.get_submodule(owner), name)
        return found if isinstance(found, torch.Tensor) else None
    return None


def tensor_of(module: nn.Module, path: str) -> torch.Tensor:
    found = find_tensor(module, path)
    if found is None:
        raise ValueError(f"{type(module).__name__} has no {path!r}: the family row does not fit this model.")
    return found


def attribute_of(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def readers(site: Site) -> list[str]:
    """The modules that read the stream in front of a sublayer (keys of cross-attention read another)."""
    return list(dict.fromkeys(module_of(p.tensor) for p in site.parts if p.role == "makes" and not p.source))


def input_axis(linear: nn.Module) -> int:
    """Axis of `weight` that the input runs along: 1 for nn.Linear [out, in], 0 for GPT-2's Conv1D [in, out]."""
    return 0 if type(linear).__name__ == "Conv1D" else 1


def output_axis(linear: nn.Module) -> int:
    return 1 - input_axis(linear)


def consumer(model: nn.Module, site: Site) -> Any:
    return model.get_submodule(f"{site.path}.{site.consumer}")


def holders_of(model: nn.Module, site: Site) -> list[nn.Module]:
    """The modules whose tensors the axes of a site run along."""
    return [model.get_submodule(module_of(f"{site.path}.{part.tensor}")) for part in site.parts]
