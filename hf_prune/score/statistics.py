"""Calibration: gate the units with forward hooks, and collect what the criteria need in one pass.

Shapes: B examples, T tokens, U units, K = U*w columns of a consumer's input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..model import experts, layerwise
from ..model.batches import Batch, forward_inputs, token_mask
from ..model.layerwise import OUTPUT
from ..model.offload import device_of, real
from ..model.patches import area, made_rows, read_rows, times_gate
from ..model.shelf import Shelf
from ..model.sites import Site, consumer, holders_of, input_axis, tensor_of
from ..model.weights import quiet
from ..plan import Where
from .criteria import Criterion, SiteStatistics
from .experts import ExpertSums, expert_statistics
from .losses import predicts_tokens
from .passes import backward, recomputed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gate_hook(gate: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that multiplies each unit's columns or channels by its gate. gate: [B, U], or [1, U] for
    all examples.

    The product is formed in fp32, so that the gate's gradient is accumulated in fp32 whatever the model's dtype.
    """

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (times_gate(module, args[0], gate).to(args[0].dtype), *args[1:])

    return hook


@contextlib.contextmanager
def gated(model: nn.Module, gates: Mapping[Where, torch.Tensor], sites: Sequence[Site]) -> Iterator[None]:
    """Install a gate on the consumer of every site in `gates`; hooks are gone afterwards, also after an error."""
    with contextlib.ExitStack() as stack:
        for site in (site for site in sites if site.key in gates):
            gate, linear = gates[site.key], consumer(model, site)
            if site.routed:
                stack.enter_context(experts.gated(linear, gate))
            else:
                stack.callback(linear.register_forward_pre_hook(gate_hook(gate)).remove)
        yield


Found = dict[str, Any]


@dataclass
class Gradients:
    """From one backward pass over a batch, per site: gradients of each example's loss with respect to the gates at 1
    [B, U], and the squared length of those with respect to what each token gets from the consumer [B*T]."""

    gates: dict[Where, torch.Tensor]
    tokens: dict[Where, torch.Tensor]


def gradients(
    model: PreTrainedModel,
    sites: Sequence[Site],
    units: Mapping[Where, int],
    batch: Batch,
    draw_labels: torch.Generator | None = None,
    outputs: Mapping[Where, torch.Tensor] | None = None,
) -> Gradients:
    """What one backward pass over a batch tells about the units and the tokens.

    Args:
        draw_labels: draw the labels from the model's own predictions with this generator instead.
        outputs: sums [D, D] to which the products ggᵀ of the gradients at each token's output are added, by site.
    """
    device = device_of(model)
    gates = {site.key: torch.ones(batch.size, units[site.key], device=device, requires_grad=True) for site in sites}
    tokens: dict[Where, torch.Tensor] = {}
    layers = [model.get_submodule(path) for path in dict.fromkeys(site.path for site in sites)]
    watched = _output_gradients(model, sites, tokens, outputs or {})
    with torch.enable_grad(), recomputed(layers), gated(model, gates, sites), watched:
        backward(model, batch, draw_labels)
    found = {key: torch.zeros_like(gate) if gate.grad is None else gate.grad for key, gate in gates.items()}
    return Gradients(found, tokens)


@contextlib.contextmanager
def _output_gradients(
    model: nn.Module, sites: Sequence[Site], squares: dict[Where, torch.Tensor], products: Mapping[Where, torch.Tensor]
) -> Iterator[None]:
    def watch(key: Where) -> Any:
        def keep(module: nn.Module, gradient: torch.Tensor) -> None:
            rows = made_rows(module, gradient).float().flatten(0, -2)
            squares[key] = rows.square().sum(-1)
            if key in products:
                products[key].addmm_(rows.T, rows)

        return lambda module, args, output: output.register_hook(partial(keep, module)) and None

    handles = [consumer(model, site).register_forward_hook(watch(site.key)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Ranks:
    """Processes that share a statistics pass: each sees every `count`-th batch, and sums are added up over all."""

    index: int = 0
    count: int = 1

    def mine(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        return batches[self.index :: self.count]

    def sum_(self, *tensors: torch.Tensor) -> None:
        """Add up over the processes, in place."""
        for tensor in tensors if self.count > 1 else ():
            torch.distributed.all_reduce(tensor)

    def gather(self, mine: list[torch.Tensor]) -> list[torch.Tensor]:
        """What every process has found of its batches, in the order of the batches."""
        if self.count == 1:
            return mine
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, mine)
        return [each[i].to(mine[0].device) for i in range(len(found[0])) for each in found if i < len(each)]


ALONE = Ranks()


def statistics(
    model: PreTrainedModel,
    sites: Sequence[Site],
    axes: Mapping[Where, str],
    batches: Sequence[Batch],
    criterion: Criterion,
    seed: int,
    ranks: Ranks = ALONE,
) -> Iterator[tuple[Site, list[SiteStatistics]]]:
    """What the criterion needs, site by site (of experts' neurons: expert by expert); second moments of one layer at a
    time.

    Args:
        axes: the axis by whose units each site is scored.
        ranks: the processes that share the work; all call this with the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    units = {site.key: site.sizes[axes[site.key]] for site in sites}
    if len(batches) < ranks.count:
        ranks = ALONE  # less work than processes: each does it all
    with quiet(model):
        gates = _gates(model, sites, units, batches, criterion, generator, ranks) if criterion.needs_loss else {}
        for site, moments in _moments(model, sites, axes, batches, criterion, ranks):
            found = {"generator": generator, **gates.pop(site.key, {}), **moments}
            with real(*holders_of(model, site)):
                if site.routed:
                    each = expert_statistics(model.get_submodule(site.path), site, axes[site.key], found)
                else:
                    each = [_of_matrix(model, site, axes[site.key], found)]
            yield site, each


def _of_matrix(model: nn.Module, site: Site, axis: str, found: Found) -> SiteStatistics:
    linear = consumer(model, site)
    weight = linear.weight.detach().float()
    return SiteStatistics(
        units=site.sizes[axis],
        weight=(weight.T if input_axis(linear) == 0 else weight.flatten(1)).cpu(),
        weight_square=_weight_squares(model, site, axis).cpu(),
        **found,
    )


def _gates(
    model: PreTrainedModel,
    sites: Sequence[Site],
    units: Mapping[Where, int],
    batches: Sequence[Batch],
    criterion: Criterion,
    generator: torch.Generator,
    ranks: Ranks,
) -> dict[Where, Found]:
    """What the gradients tell, per site; those of the gates of each example only where the criterion needs them."""
    names, device = ("gate_square", "gate_abs"), device_of(model)
    found: dict[Where, Found] = {
        site.key: {name: torch.zeros(units[site.key], device=device) for name in names} for site in sites
    }
    outputs = {}
    for site in sites if "outputs" in criterion.needs else ():
        outputs[site.key] = torch.zeros(site.hidden, site.hidden, device=device)
    each: dict[Where, list[torch.Tensor]] = {site.key: [] for site in sites}
    # where every token predicts something, all matter, and weights by one label's gradient are but noise (measured)
    weighed = [site for site in sites if site.active and not any(predicts_tokens(model, batch) for batch in batches)]
    tokens: dict[Where, list[torch.Tensor]] = {site.key: [] for site in weighed}
    examples = sum(batch.size for batch in batches)
    draw_labels = generator if criterion.labels == "model" else None
    if draw_labels is not None:
        ranks = ALONE  # the draws follow one another
    for batch in tqdm(ranks.mine(batches), desc="scoring", leave=False):
        seen = gradients(model, sites, units, batch, draw_labels, outputs)
        for key, gradient in seen.gates.items():
            found[key]["gate_square"] += gradient.square().sum(0) / examples
            found[key]["gate_abs"] += gradient.abs().sum(0) / examples
            if "examples" in criterion.needs:
                each[key].append(gradient)
        for key, squares in tokens.items():
            squares.append(seen.tokens[key])
    for site in sites:
        if site.key in outputs:
            found[site.key]["output"] = outputs.pop(site.key).div_(examples)
        ranks.sum_(*found[site.key].values())
        known = {key: value.cpu() for key, value in found[site.key].items()}
        gate = torch.cat(ranks.gather(each[site.key])).cpu() if each[site.key] else None
        weights = ranks.gather(tokens[site.key]) if site.key in tokens else None
        found[site.key] = {**known, "gate": gate, "tokens": weights}
    return found


def _moments(
    model: PreTrainedModel,
    sites: Sequence[Site],
    axes: Mapping[Where, str],
    batches: Sequence[Batch],
    criterion: Criterion,
    ranks: Ranks,
) -> Iterator[tuple[Site, Found]]:
    """Moments of the consumers' inputs, where the criterion reads them; of experts always (whether they see any)."""
    read = {"gram", "moments"} & {*criterion.needs}
    walked = [site for site in sites if read or (site.routed and criterion.needs)]
    yield from ((site, {}) for site in sites if site not in walked)
    if walked:
        yield from _walk(model, walked, axes, ranks.mine(batches), "gram" in criterion.needs, ranks)


def _walk(
    model: PreTrainedModel,
    sites: Sequence[Site],
    axes: Mapping[Where, str],
    batches: Sequence[Batch],
    full: bool,
    ranks: Ranks,
) -> Iterator[tuple[Site, Found]]:
    """Moments of every consumer's input in the dense stream, one layer at a time."""
    shelf = Shelf.beside(model)
    for stack in dict.fromkeys(site.stack for site in sites):
        paths = list(dict.fromkeys(site.path for site in sites if site.stack == stack))
        layers = [model.get_submodule(path) for path in paths]
        stream = layerwise.capture(model, layers, [forward_inputs(model, batch) for batch in batches], shelf)
        masks = stream.spread([token_mask(model, batch, stack) for batch in batches])
        progress = tqdm(paths, desc=f"scoring {stack}", leave=False)
        for path, layer, kwargs in zip(progress, layers, stream.kwargs, strict=True):
            here = [site for site in sites if site.path == path]
            with real(*layer.modules()):  # loaded once for all batches
                found = {site.key: _sums(model, site, axes[site.key], full) for site in here}
                for index, (state, arguments) in enumerate(zip(stream.states, kwargs, strict=True)):
                    seen = layerwise.run(layer, state, arguments, inputs_of=[site.consumer for site in here])
                    stream.states[index] = seen[OUTPUT]
                    for site in here:
                        if site.consumer in seen:
                            x, module = seen[site.consumer], layer.get_submodule(site.consumer)
                            found[site.key].see(x if site.routed else read_rows(module, x), masks[index])
            for site in here:
                yield site, found.pop(site.key).means(ranks)


def _sums(model: PreTrainedModel, site: Site, axis: str, full: bool) -> Any:
    if site.routed:
        return ExpertSums(consumer(model, site), axis == site.outer.name, full)
    return Sums(site.columns * area(consumer(model, site)), device_of(model), full)


class Sums:
    """Running sums over tokens of a consumer's input, in fp32."""

    def __init__(self, columns: int, device: torch.device, full: bool) -> None:
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)  # fp32 stops counting at 2**24
        self.total = torch.zeros(columns, device=device)
        self.square = torch.zeros(columns, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if full else None

    def see(self, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        """x: [B, T, K] or [B*T, K]; mask: of real tokens, [B*T]."""
        self.add(rows_of(x, mask))

    def add(self, x: torch.Tensor) -> None:
        """x: [n, K]"""
        self.tokens += len(x)
        self.total += x.sum(0)
        self.square += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)

    def means(self, ranks: Ranks = ALONE) -> dict[str, torch.Tensor]:
        ranks.sum_(*(value for value in vars(self).values() if value is not None))
        n = self.tokens.clamp_min(1)
        gram = {} if self.gram is None else {"gram": self.gram / n}
        return {key: value.cpu() for key, value in {"mean": self.total / n, "square": self.square / n, **gram}.items()}


def rows_of(x: torch.Tensor, mask: torch.Tensor | None, examples: torch.Tensor | None = None) -> torch.Tensor:
    """[B, T, K] or [B*T, K] -> the rows [n, K] at real tokens (of the chosen examples), in fp32."""
    flat = x.reshape(-1, x.shape[-1])
    keep = mask
    if examples is not None:
        chosen = examples.repeat_interleave(len(flat) // len(examples))
        keep = chosen if keep is None else keep & chosen
    return (flat if keep is None else flat[keep.to(flat.device)]).float()


def _weight_squares(model: nn.Module, site: Site, axis: str) -> torch.Tensor:
    """Sum of squares of all weights that go with a unit. [U]"""
    layer, units, goes = model.get_submodule(site.path), site.sizes[axis], site.along_with(axis)
    total: Any = 0.0
    for part in site.parts:
        if part.role != "carries":
            along = tensor_of(layer, part.tensor).detach().float().square().transpose(0, part.dim).flatten(1).sum(1)
            sizes = [site.sizes[name] * part.entries(name, site.widths) for name in part.axes]
            blocks = zip(along.split(sizes), part.axes, strict=True)
            total = total + sum(block.view(units, -1).sum(1) for block, name in blocks if name in goes)
    return total
