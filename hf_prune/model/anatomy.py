"""A family row resolved on a live model: its sites and sizes, read off the weights. No forward pass.

Shapes: T tokens, D hidden width, L layers, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .axes import Family, Part
from .lookup import family_of
from .outside import image_tokens, other_elements, outside_macs, tower_tokens
from .sites import Extent, Site, Where, find_sites, find_stacks, tensor_of
from .tokens import params_a_token, token_parts
from .weights import check_model, check_weights

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


def describe(model: PreTrainedModel) -> Anatomy:
    """The anatomy of a live model, which may be on the meta device.

    Raises:
        TypeError: no transformers model, or a wrapper of one.
        ValueError: unknown family, or a path of its row that does not resolve; adapters; quantised or sharded weights.
    """
    check_model(model)
    check_weights(model)
    family = family_of(model)
    sites = find_sites(model, family)
    extents = find_stacks(model, family)
    paths = {(e.where[0], i): f"{e.path}.{i}" for e in extents for i in range(e.of)}
    layers = {where: model.get_submodule(path) for where, path in paths.items()}
    in_sites = {f"{site.path}.{part.tensor}" for site in sites for part in site.parts}
    vocabulary, tokens = token_parts(model, [*paths.values()]), image_tokens(model)
    per_token, per_example = outside_macs(model, [*paths.values()], tokens)
    return Anatomy(
        model_type=family.model_type,
        family=family,
        sites=tuple(sites),
        extents=(*extents, *_vocabulary(model, family, vocabulary)),
        hidden_size=sites[0].hidden if sites else getattr(model.config.get_text_config(), "hidden_size", 0),
        total_params=sum(p.numel() for p in model.parameters()),
        total_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        block_params=sum(p.numel() for layer in layers.values() for p in layer.parameters()),
        layer_params={key: sum(p.numel() for p in layer.parameters()) for key, layer in layers.items()},
        layer_weights={where: other_elements(model, path, in_sites) for where, path in paths.items()},
        token_params=params_a_token(model, vocabulary),
        token_weights=sum(tensor_of(model, part.tensor).shape[1] for part in vocabulary if part.role == "makes"),
        outside_macs_token=per_token,
        outside_macs_example=per_example,
        image_tokens=tokens,
        tower_tokens=tower_tokens(model, [e.where[0] for e in extents]),
    )


def _vocabulary(model: Any, family: Family, parts: tuple[Part, ...]) -> list[Extent]:
    if not parts or family.tokens is None:
        return []
    return [Extent((), family.tokens, tensor_of(model, parts[0].tensor).shape[0], parts=parts)]
