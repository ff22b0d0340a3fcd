"""What one calibration pass tells about experts, in the form that criteria read.

The neurons of each expert are a site of their own, whose consumer reads what the expert makes of the tokens sent to it,
times their weights. Whole experts are the columns of a sum: an expert's column is what it adds to a token, a vector,
and the products of two columns are those of these vectors. So a criterion needs to know nothing of experts.

Shapes: n tokens, k experts of a token, E experts, I neurons of each, D hidden width, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..model.experts import Call, contributions, neurons
from ..model.sites import Site, tensor_of
from .criteria import SiteStatistics

FEW = 32  # tokens, of which an expert should see more to be judged by them


class ExpertSums:
    """Running sums over the tokens that a layer of experts sees, in fp32, by expert."""

    def __init__(self, module: Any, whole: bool, full: bool) -> None:
        """`whole`: of experts, not of the neurons in each; `full`: all products."""
        self.module, self.whole = module, whole
        experts, columns, width = len(module.down_proj), *_sizes(module)
        shape, device = (experts,) if whole else (experts, columns), module.down_proj.device
        self.total = torch.zeros(*shape[:1], width if whole else columns, device=device)
        self.square = torch.zeros(shape, device=device)
        self.gram = torch.zeros(*shape, shape[-1], device=device) if full else None
        self.norm = torch.zeros(experts, device=device)
        self.seen = torch.zeros(experts, device=device, dtype=torch.float64)
        self.tokens = torch.zeros((), device=device, dtype=torch.float64)

    def see(self, given: Any, mask: torch.Tensor | None) -> None:
        """given: what the module is called with; mask: of real tokens, [n]."""
        call = Call.of(given, mask)
        self.tokens += len(call.hidden)
        self.seen += torch.bincount(call.index.flatten(), minlength=len(self.seen))
        made = contributions(self.module, call).float()
        self.norm.index_add_(0, call.index.flatten(), made.norm(dim=-1).flatten())
        if self.whole:
            self._add_experts(call, made)
        else:
            self._add_neurons(call)

    def _add_experts(self, call: Call, made: torch.Tensor) -> None:
        """made: [n, k, D]"""
        flat = call.index.flatten()
        self.total.index_add_(0, flat, made.flatten(0, 1))
        self.square.index_add_(0, flat, made.square().sum(-1).flatten())
        if self.gram is not None:
            products = made @ made.transpose(1, 2)  # [n, k, k]
            at = call.index[:, :, None] * len(self.seen) + call.index[:, None, :]
            self.gram.view(-1).index_add_(0, at.flatten(), products.flatten())

    def _add_neurons(self, call: Call) -> None:
        for expert, rows, places in call.by_expert():
            inner = neurons(self.module, expert, call.hidden[rows]) * call.weights[rows, places, None]
            x = inner.float()
            self.total[expert] += x.sum(0)
            self.square[expert] += x.square().sum(0)
            if self.gram is not None:
                self.gram[expert].addmm_(x.T, x)

    def means(self, ranks: Any) -> dict[str, torch.Tensor]:
        """Over all tokens; of `saliency` over those that an expert sees."""
        ranks.sum_(*(value for value in vars(self).values() if isinstance(value, torch.Tensor)))
        n = self.tokens.clamp_min(1).float()
        mean = self.total / n
        found = {
            "mean": mean.norm(dim=1) if self.whole else mean,
            "square": self.square / n,
            "saliency": self.norm / self.seen.clamp_min(1).float(),
            "seen": self.seen.float(),
        }
        return {key: value.cpu() for key, value in (found | self._products(n)).items()}

    def _products(self, n: torch.Tensor) -> dict[str, torch.Tensor]:
        return {} if self.gram is None else {"gram": self.gram / n}


def _sizes(module: Any) -> tuple[int, int]:
    """Neurons of an expert, and the hidden width."""
    first, second = module.down_proj.shape[1:]
    return (first, second) if module.is_transposed else (second, first)


def expert_statistics(layer: Any, site: Site, axis: str, found: Mapping[str, Any]) -> list[SiteStatistics]:
    """Of whole experts one, of neurons one an expert.

    Args:
        found: what is known of the site: gradients of gates [U] or [B, U], and what `ExpertSums` gave.
    """
    squares = weight_squares(layer, site, axis)
    if axis == site.outer.name:
        units = len(squares)
        output = found.get("output")
        known = {**found, "output": None if output is None else (output.trace() / len(output)).view(1, 1)}
        return [SiteStatistics(units=units, weight=torch.ones(1, units), weight_square=squares.flatten(), **known)]
    return [
        SiteStatistics(
            units=site.share,
            weight=_down(layer, site, expert),
            weight_square=squares[expert],
            **{key: _of_expert(key, value, expert, site) for key, value in found.items()},
        )
        for expert in range(site.sizes[site.outer.name])
    ]


SHARED = {"generator", "tokens", "output"}  # by all experts of a layer
BY_EXPERT = {"mean", "square", "gram", "saliency", "seen"}


def _of_expert(key: str, value: Any, expert: int, site: Site) -> Any:
    """One expert's part of what is known of its layer."""
    if value is None or key in SHARED:
        return value
    if key in BY_EXPERT:
        return value[expert : expert + 1] if value.dim() == 1 else value[expert]
    return value.view(*value.shape[:-1], -1, site.share)[..., expert, :]


def _down(layer: Any, site: Site, expert: int) -> torch.Tensor:
    """The matrix that reads the neurons of an expert, [D, I], in fp32."""
    (part,) = (part for part in site.parts if part.role == "reads")
    weight = tensor_of(layer, part.tensor)[expert].detach().float().cpu()
    return weight if part.dim == 2 else weight.T


def weight_squares(layer: Any, site: Site, axis: str) -> torch.Tensor:
    """Sum of squares of all weights that go with an expert [E, 1], or with each neuron of every expert [E, I]."""
    whole, total = axis == site.outer.name, torch.zeros(())
    for part in site.parts:
        if bool(part.within) == whole or (part.role == "carries" and not whole):
            continue
        tensor = tensor_of(layer, part.tensor).detach().float().square().cpu()
        if whole:
            total = total + tensor.transpose(0, part.dim).reshape(site.sizes[axis], -1).sum(1, keepdim=True)
            continue
        along = tensor.transpose(1, part.dim).flatten(2).sum(2)  # [E, entries]
        blocks = along.split(along.shape[1] // len(part.axes), 1)
        total = total + sum(block.view(len(block), site.share, -1).sum(2) for block in blocks)
    return total


def where_few(scores: list[torch.Tensor], found: list[SiteStatistics]) -> tuple[torch.Tensor, list[int]]:
    """The scores of all units, [U], and the experts that see too few tokens to be judged by them: such a one counts
    less than any other, its neurons by magnitude."""
    if found[0].seen is None:  # no experts, or a criterion that reads no data
        return torch.cat(scores), []
    seen = torch.cat([each.seen for each in found if each.seen is not None])
    blocks = torch.cat(scores).view(len(seen), -1)
    magnitude = torch.cat([each.weight_square.flatten() for each in found]).sqrt().view_as(blocks)
    few = seen < FEW
    if few.any() and not few.all():
        least = blocks[~few].mean(1).min().clamp_min(0)
        share = magnitude / magnitude.mean(1, keepdim=True).clamp_min(1e-30)
        blocks = torch.where(few[:, None], share * least * (seen / FEW)[:, None], blocks)
    return blocks.flatten(), few.nonzero().flatten().tolist()
