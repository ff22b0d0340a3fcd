"""A family row resolved on a live model: its sites and sizes, read off the weights. No forward pass.

Shapes: T tokens, D hidden width, L layers, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .axes import Family, Part
from .lookup import family_of
from .maps import matrices_of, positions
from .offload import tie_again_
from .outside import image_tokens, other_elements, outside_macs, rows_outside, tower_tokens
from .sites import Extent, Site, Where, find_sites, find_stacks, module_of, refused_by, tensor_of
from .tokens import params_a_token, token_parts
from .weights import check_model, check_weights
from .wide import Share, find_hidden, shares

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Anatomy:
    """The sites of a model, its wider axes, and what lies outside them, as plain data."""

    model_type: str
    family: Family
    sites: tuple[Site, ...]
    extents: tuple[Extent, ...]
    hidden_size: int
    total_params: int
    total_bytes: int
    block_params: int
    layer_params: dict[Where, int]  # (stack, layer) -> all parameters of the layer
    layer_weights: dict[Where, int]  # and elements of its matrices outside the sites
    token_params: float  # that one token of the vocabulary takes with it
    token_weights: float  # of them elements of matrices that run: the head's
    outside_macs_token: float  # multiply-adds outside the blocks, per token
    outside_macs_example: float  # and per example
    image_tokens: int | None  # tokens of one image, None for text
    tower_tokens: dict[str, int]  # of one image in a tower beside others, by stack
    shares: tuple[Share, ...] = ()  # of the tensors that axes of the whole model run along

    @property
    def sizes(self) -> dict[Where, dict[str, int]]:
        """Units by axis of every site, of the layers of every stack, and of the model; of a layer none."""
        layers: dict[Where, dict[str, int]] = {layer: {} for layer in self.layer_params}
        wide = {extent.where: {extent.axis.name: extent.of} for extent in self.extents}
        return {site.key: dict(site.sizes) for site in self.sites} | layers | wide

    @property
    def words(self) -> dict[Where, dict[str, int]]:
        """`sizes` by every word that a plan may use for an axis."""
        aliases = {
            site.key: {axis.alias: site.sizes[axis.name] for axis in site.row.axes if axis.alias} for site in self.sites
        }
        return {where: counts | aliases.get(where, {}) for where, counts in self.sizes.items()}

    def tokens(self, sequence_length: int, stack: str = "") -> int:
        """Tokens of an example, in a stack."""
        return self.tower_tokens.get(stack) or self.image_tokens or sequence_length

    def extent(self, *where: Any) -> Extent:
        return next(extent for extent in self.extents if extent.where == where)

    def without_stem(self) -> Anatomy:
        """The anatomy in which the stem lies outside the blocks like all else there, and nothing of it can go."""
        stem = [site for site in self.sites if site.is_stem]
        return replace(
            self,
            sites=tuple(site for site in self.sites if not site.is_stem),
            extents=tuple(extent for extent in self.extents if not extent.is_stem),
            outside_macs_token=self.outside_macs_token + sum(s.elements(s.sizes, matrices=True) for s in stem),
        )

    def narrowed(self, sizes: Mapping[Where, Mapping[str, int]]) -> Anatomy:
        """The anatomy with so many units of the axes that run through the whole model, those of `sizes`."""
        left = {
            e.where: sizes[e.where][e.axis.name] / e.of
            for e in self.extents
            if e.is_wide and sizes.get(e.where, {}).get(e.axis.name, e.of) != e.of
        }
        return self if not left else _narrowed(self, left)


def describe(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a live model, which may be on the meta device, or offloaded.

    Raises:
        TypeError: no transformers model, or a wrapper of one.
        ValueError: unknown family, or a path of its row that does not resolve; adapters; quantised or sharded weights.
    """
    check_model(model)
    check_weights(model)
    tie_again_(model)
    family = family_of(model)
    sites = find_sites(model, family)
    extents = find_stacks(model, family)
    paths = {(e.where[0], i): path for e in extents if not e.is_stem for i, path in enumerate(e.layers)}
    layers = {where: model.get_submodule(path) for where, path in paths.items()}
    in_sites = {f"{site.path}.{part.tensor}" for site in sites for part in site.parts}
    vocabulary, tokens = token_parts(model, [*paths.values()]), image_tokens(model)
    applied = positions(model) if family.maps else {}
    if applied:
        sites, tokens = [_applied(site, applied) for site in sites], 1  # what costs is counted for each image
        weighed = {name: size * applied.get(name, 0) for name, size in matrices_of(model).items()}
        inside = {where: _under(path, weighed, in_sites) for where, path in paths.items()}
        per_token, per_example = 0.0, float(sum(s for n, s in weighed.items() if not n.startswith(_roots(paths))))
    else:
        inside = {where: other_elements(model, path, in_sites) for where, path in paths.items()}
        rows = rows_outside(model, [*paths.values()], tokens)
        sites = [_applied(site, {name: row[0] for name, row in rows.items()}) for site in sites]
        per_token, per_example = outside_macs(model, rows, in_sites)
    family, blocks = refused_by(model.config, family), [site for site in sites if not site.is_stem]
    hidden, reason = find_hidden(model, family, blocks)
    if reason:
        family = replace(family, refused=(*family.refused, ("hidden", reason)))
    return Anatomy(
        model_type=family.model_type,
        family=family,
        sites=tuple(sites),
        extents=(*extents, *_vocabulary(model, family, vocabulary), *hidden),
        hidden_size=blocks[0].hidden if blocks else getattr(model.config.get_text_config(), "hidden_size", 0),
        total_params=sum(p.numel() for p in model.parameters()),
        total_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        block_params=sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        layer_params={key: sum(p.numel() for p in layer.parameters()) for key, layer in layers.items()},
        layer_weights=inside,
        token_params=params_a_token(model, vocabulary),
        token_weights=sum(tensor_of(model, part.tensor).shape[1] for part in vocabulary if part.role == "makes"),
        outside_macs_token=per_token,
        outside_macs_example=per_example,
        image_tokens=tokens,
        tower_tokens=tower_tokens(model, [e.where[0] for e in extents]),
        shares=shares(model, hidden, vocabulary, paths, in_sites, tokens),
    )


def _applied(site: Site, positions: Mapping[str, int]) -> Site:
    """The site with how often its matrices are applied to an image; those of a stem for each token."""
    found = {tensor: positions.get(module_of(f"{site.path}.{tensor}"), 1) for tensor in site.shapes}
    return replace(site, applied=found)


def _under(path: str, weighed: Mapping[str, int], but: set[str]) -> int:
    return sum(n for name, n in weighed.items() if name.startswith(f"{path}.") and f"{name}.weight" not in but)


def _roots(paths: Mapping[Where, str]) -> tuple[str, ...]:
    return tuple(f"{path}." for path in paths.values())


def _narrowed(anatomy: Anatomy, left: Mapping[Where, float]) -> Anatomy:
    """The anatomy when this share of the units of each wide axis remains."""
    values: dict[str, Any] = {name: dict(getattr(anatomy, name)) for name in ("layer_params", "layer_weights")}
    factors = [math.prod(left.get(where, 1.0) for where in share.along) for share in anatomy.shares]
    for share, factor in zip(anatomy.shares, factors, strict=True):
        for name, value in share.numbers.items():
            values[name] = values.get(name, getattr(anatomy, name)) - value * (1 - factor)
        for name, value in share.of_layer.items():
            values[name][share.layer] -= value * (1 - factor)
    narrow = [extent for extent in anatomy.extents if extent.where in left]
    values["sites"] = sites = tuple(_narrow_site(site, narrow, left) for site in anatomy.sites)
    values["extents"] = tuple(replace(e, of=round(e.of * left.get(e.where, 1.0))) for e in anatomy.extents)
    values["shares"] = tuple(share.scaled(f) for share, f in zip(anatomy.shares, factors, strict=True))
    values["hidden_size"] = next((site.hidden for site in sites if not site.is_stem), anatomy.hidden_size)
    return replace(anatomy, **{name: _counted(value) for name, value in values.items()})


def _counted(value: Any) -> Any:
    """Numbers of elements, which shares of them make up but for rounding."""
    if isinstance(value, dict):
        return {key: _counted(each) for key, each in value.items()}
    return round(value) if isinstance(value, float) else value


def _narrow_site(site: Site, narrow: Sequence[Extent], left: Mapping[Where, float]) -> Site:
    shapes = {tensor: [*shape] for tensor, shape in site.shapes.items()}
    for extent in narrow:
        for part in extent.parts:
            inside = part.tensor.removeprefix(f"{site.path}.")
            if inside != part.tensor and inside in shapes:
                shapes[inside][part.dim] = round(shapes[inside][part.dim] * left[extent.where])
    return replace(site, shapes={tensor: tuple(shape) for tensor, shape in shapes.items()})


def _vocabulary(model: Any, family: Family, parts: tuple[Part, ...]) -> list[Extent]:
    if not parts or family.tokens is None:
        return []
    return [Extent((), family.tokens, tensor_of(model, parts[0].tensor).shape[0], parts=parts)]
