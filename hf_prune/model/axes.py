"""What can be removed from a model, as data: what one index means (`Axis`), and along which tensors it runs (`Part`).

A cut, a cost and a config follow from these rows by loops that know no structure by name. Paths are relative to one
layer, those of a stack to `model.base_model`. This file needs nothing but Python.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

STEM = "stem"  # name of the stack of convolutions in front of the layers
Role = Literal["makes", "reads", "carries", "routes"]
Stock = Literal["any", "divisors", "none"]
NormPlace = Literal["", "after", "inside"]  # behind the residual sum (post-LN) · between projection and sum


@dataclass(frozen=True)
class Axis:
    """What one index means: one unit, removed whole."""

    name: str  # the word for it in `PruningConfig.units` and in plans: heads, neurons, layers, tokens, hidden
    config: str  # key that sizes it; with dots through sub-configs: text_config.intermediate_size
    stock: Stock = (
        "any"  # sizes that the stock config can say: any, only divisors of the hidden size, or none but dense
    )
    width: str = ""  # attribute of the layer that gives the entries of a unit in a tensor, or the weight of a grouped
    # convolution, whose second dimension they are; "": one
    width_config: str = ""  # key that must give that width once units are gone
    alias: str = ""  # word that means these units where there is no axis of that name
    tied: bool = False  # all sites of a kind in a stack keep the same indices
    aligned: bool = False  # counts are rounded to `PruningConfig.align`
    mixes: bool = False  # a unit compares tokens with tokens: 2·T·width multiply-adds a token beside its matrices
    fixed: tuple[int, ...] = ()  # units that always stay
    also: tuple[str, ...] = ()  # keys that must say the same number, though they size nothing
    each: bool = False  # the key counts the units in each unit of the outer axis
    multiple: str = ""  # key of how often there are as many units as the axis's own key says: shared experts in one
    step: int = 1  # counts are multiples of it, whatever `PruningConfig.align` says
    routed: str = ""  # key of how many units a token goes through: as many must stay, and they alone cost multiply-adds
    split: str = ""  # key of how many groups the units lie in, one after the other, each of as many units
    repeated: tuple[str, ...] = ()  # attributes of the whole model that say the key's number


@dataclass(frozen=True)
class Part:
    """One dimension of one tensor, and the axes that lie along it one after the other.

    A fused matrix with rows [q | k | v] has the axes (heads, kv_groups, kv_groups). Where the rows of a unit lie
    together, as in [heads, (q, k, v)], that is one axis whose unit is three times as wide.
    """

    tensor: str  # parameter or buffer
    dim: int
    axes: tuple[str, ...]
    role: Role = "makes"  # makes units · reads them (their columns are gated and refitted) · carries values of them ·
    # routes: tokens choose among units by what it gives
    times: int = 1  # entries of a unit, in widths of its axis
    single: bool = False  # one entry a unit, whatever the width of its axis: a bias of each head
    width: str = ""  # attributes, joined by +, that give a unit's entries here where they are not its axis's width
    source: str = ""  # stack whose output a matrix reads that does not read its own: keys of cross-attention
    optional: bool = False  # not there in every model of the family
    within: str = ""  # axis along dimension 0 of the tensor, each of whose units holds its own of these

    def along(self, axis: str, counts: Mapping[str, int]) -> int:
        """Units of one of the axes along the dimension, where there are so many."""
        return counts[axis] // max(counts[self.within], 1) if self.within else counts[axis]

    def entries(self, axis: str, widths: Mapping[str, int]) -> int:
        """Of a unit of one of the axes, where these are their widths."""
        return self.times * (1 if self.single else widths[self.width or axis])


@dataclass(frozen=True)
class Count:
    """A module attribute that holds a number of units, or of columns, or of units in each unit of the outer axis."""

    attribute: str
    axis: str
    of: Literal["units", "columns", "each"] = "units"


@dataclass(frozen=True)
class Argument:
    """A tensor that a layer is called with, made by an earlier layer, with units along one dimension."""

    name: str
    dim: int
    axis: str


@dataclass(frozen=True)
class Sublayer:
    """One sublayer: its axes, outermost first, where they lie, and what else knows their sizes."""

    kind: str  # attention, cross_attention, ffn: the last word of a site's key
    axes: tuple[Axis, ...]
    parts: tuple[Part, ...]
    counts: tuple[Count, ...] = ()
    arguments: tuple[Argument, ...] = ()
    optional: bool = False  # not in every layer of its stack: experts among dense layers, attention among state spaces
    config_view: str = ""  # module whose forward() reads sizes from its config
    norm: str = ""
    norm_place: NormPlace = ""


@dataclass(frozen=True)
class Stack:
    """A list of layers, and its own axis: the layers. Or a stem, which is one module and is cut as one layer.

    A stem holds convolutions in front of the layers. It counts among no blocks, and its units go only where
    `PruningConfig.units` names them.
    """

    name: str  # encoder, decoder; text, vision, audio: the towers of a model that has several; stem
    layers: str  # path of the list; of a stem that of the module
    axis: Axis
    sublayers: tuple[Sublayer, ...]  # in the order in which a layer runs them
    only: tuple[str, str, str] | None = None  # config key, its value in models that have this stack, and why the units
    # must stay in others

    @property
    def is_stem(self) -> bool:
        return self.name == STEM


@dataclass(frozen=True)
class Family:
    """A row of `FAMILIES`."""

    model_type: str
    stacks: tuple[Stack, ...]
    tokens: Axis | None = Axis(
        "tokens", "vocab_size"
    )  # of the embeddings, which transformers names (`get_input_embeddings`)
    hidden: Axis | None = None  # channels of the stream that all layers read and add to; where they lie is found
    as_model_type: str = ""  # same weights, any head count: the explicit door where `stock` says divisors
    post_norm_unless: str = ""  # config key; the norms stand behind the sum where it is false
    norm_offset: float = 0.0  # norms compute x * (norm_offset + weight)
    shapes: tuple[str, ...] = ("stock", "uniform", "per_layer")  # in which it can be cut
    maps: bool = False  # layers work on maps of pixels: how often a matrix is applied is counted for each, see `maps`
    refused: tuple[tuple[str, str], ...] = ()  # units that cannot go, and why

    @property
    def layered(self) -> Family:
        """The row without its stem."""
        return replace(self, stacks=tuple(stack for stack in self.stacks if not stack.is_stem))


# --- how rows are written --------------------------------------------------------------------------------------------

Parts = tuple[Part, ...]


def made_by(
    path: str,
    *axes: str,
    conv1d: bool = False,
    times: int = 1,
    source: str = "",
    optional: bool = False,
    width: str = "",
) -> Parts:
    """The outputs of a linear module, weight and bias. `conv1d`: GPT-2's, whose weight is [in, out]."""
    return (
        Part(f"{path}.weight", int(conv1d), axes, "makes", times, width=width, source=source, optional=optional),
        Part(f"{path}.bias", 0, axes, "carries", times, width=width, source=source, optional=True),
    )


def read_by(path: str, axis: str, conv1d: bool = False) -> Parts:
    """The inputs of a linear module: the columns of its weight."""
    return (Part(f"{path}.weight", int(not conv1d), (axis,), "reads"),)
