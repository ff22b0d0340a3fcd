"""Cut and repair one stack, bottom to top: the dense and the pruned stream advance together, one layer at a time.

Within a layer each sublayer is cut and repaired before the next is looked at, so that every refit sees the inputs that
the finished model will give it. "The stream" is the residual (pre-norm), or the sum before the norm (post-LN). Where
layers go, the last sublayer before them is refitted towards the dense stream behind them (the linear map of ReplaceMe,
Shopkhoev et al. 2025, section 3, folded into the projection that is there).

Shapes: B examples, T tokens, n real tokens, K input columns of a consumer, D hidden width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm

from ..model import layerwise
from ..model.cut import columns_of, cut_, cut_arguments, kept_columns
from ..model.experts import Call, down_matrices, set_down_matrices_, slots
from ..model.layerwise import OUTPUT, Stream
from ..model.offload import bare, real
from ..model.patches import area, is_convolution, read_rows
from ..model.shelf import Shelved
from ..model.sites import Site, input_axis, readers
from ..plan import Kept, PruningPlan, Where
from ..score.statistics import rows_of
from .experts import Routed, refit_experts
from .running import calls_of, estimate_, in_order, norms_of
from .solve import (
    BLENDS,
    TOKENS_A_COLUMN,
    ChannelSums,
    Moments,
    Refit,
    best_of,
    refit,
    refit_channels,
    rescale,
    shift_bias,
    token_weights,
)
from .width import Channels, fold_, matrix_of, rescale_norm_, set_matrix_

Sums = TypeVar("Sums")
Streams = dict[str, Shelved]  # by kind of sublayer, one tensor a batch
Targets = Sequence[torch.Tensor] | None  # a batch each; None where only what the consumer itself gave is wanted


@dataclass
class StackRepair:
    """Both streams of one stack, and which rows count.

    `masks` [B*T] are True at real tokens; `held_out` [B] is 0 for examples that repairs are fitted to, else the number
    of the set that the example is in, which chooses among repairs and refuses them.
    """

    plan: PruningPlan
    stack: str
    method: str  # "least_squares", "rescale" or "bias"
    dense: Stream
    pruned: Stream
    masks: Sequence[torch.Tensor | None]
    held_out: Sequence[torch.Tensor]
    norm_offset: float = 0.0
    gradients: Mapping[Where, Sequence[torch.Tensor]] = field(default_factory=dict)  # squared, [B*T] per batch
    channels: Channels | None = None  # of the stream that stay; the pruned stream is as narrow
    batch_norm: bool = False  # whether running statistics behind a cut are estimated again
    _norms: dict[str, nn.Module] = field(default_factory=dict, init=False)  # of the layer at hand, as when dense
    _advanced: bool = field(default=False, init=False)  # whether the pruned stream has been through the layer at hand

    def run_(self, layers: Sequence[nn.Module], sites: Sequence[Sequence[Site]]) -> list[dict[str, Any]]:
        """Cut and repair the layers that stay in place; one report per site that is cut, or stands before a gap."""
        reports: list[dict[str, Any]] = []
        kept = self.plan.layers(self.stack, len(layers))
        for gone in range(kept[0]):
            with real(*layers[gone].modules()):
                self._advance_dense(gone, layers[gone], sites[gone])
        diverged = any(not torch.equal(a, b) for a, b in zip(self.dense.states, self.pruned.states, strict=True))
        progress = tqdm(kept, desc=f"cut and repair {self.stack}", leave=False)
        for index, following in zip(progress, (*kept[1:], len(layers)), strict=True):
            with real(*layers[index].modules()):  # loaded once for all batches, stored when done
                layer, here = layers[index], sites[index]
                reads, targets = self._advance_dense(index, layer, here)
                self._narrow_(layer, here)
                for gone in range(index + 1, following):
                    with real(*layers[gone].modules()):
                        behind = self._advance_dense(gone, layers[gone], sites[gone])[1]
                    if targets and behind:
                        targets[here[-1].kind] = behind[sites[gone][-1].kind]
                self._advanced, waiting = False, norms_of(layer) if self.batch_norm else []
                for position, site in enumerate(here):
                    waiting = self._estimate_(index, layer, waiting, diverged, site.consumer)
                    read, wanted = reads.pop(site.kind), targets.pop(site.kind, None)  # large: let go when done
                    realigned = not site.routed and self._adapt_(index, layer, site, read, diverged)
                    bridges = site is here[-1] and wanted is not None and not site.routed
                    bridges = bridges and self.method == "least_squares"
                    gap = following - index - 1 if bridges else 0
                    if gap or self.channels or not self.plan[site.key].is_identity:
                        report = self._site_(index, layer, here[: position + 1], wanted, site is here[-1])
                        reports.append(report | {"realigned": realigned, "gap": gap})
                        diverged = True
                    del read, wanted
                self._estimate_(index, layer, waiting, diverged)
                if not self._advanced:
                    self._advance_pruned(index, layer)
                diverged = diverged or following > index + 1
        return reports

    def _advance_dense(self, index: int, layer: nn.Module, sites: Sequence[Site]) -> tuple[Streams, Streams]:
        """Run the dense layer. By sublayer and batch: what it reads, and the stream behind it (post-LN: before its
        norm); no streams where the layer adds more to it than these sublayers give."""
        shelf = self.dense.states.shelf
        reads: Streams = {site.kind: shelf.list() for site in sites}
        targets: Streams = {site.kind: shelf.list() for site in sites}
        first = {site.kind: readers(site)[0] for site in sites}
        wanted = [path for site in sites for path in {site.consumer, _end(site)}]
        is_sum = True
        for batch, state in enumerate(self.dense.states):
            arguments = self.dense.kwargs[index][batch]
            seen = layerwise.run(layer, state, arguments, inputs_of=list(first.values()), outputs_of=wanted)
            for site in sites:
                if site.consumer in seen:
                    reads[site.kind].append(seen[first[site.kind]])
                    part = _end(site) if site.row.norm_place == "inside" else site.consumer
                    is_sum = is_sum and seen[part].numel() == state.numel()
                    if not is_sum:  # a convolution with fewer positions, or other channels
                        continue
                    summed = state + seen[part].view_as(state)
                    state = seen[_end(site)].view_as(state) if site.row.norm_place == "after" else summed
                    targets[site.kind].append(summed)
            is_sum = is_sum and _same(state, seen[OUTPUT])
            self.dense.states[batch] = seen[OUTPUT]
        return reads, targets if is_sum else {}

    def _estimate_(
        self, index: int, layer: nn.Module, waiting: Sequence[str], diverged: bool, before: str = ""
    ) -> list[str]:
        """Estimate the running statistics of the waiting norms of a layer, of those alone that it runs before a module;
        returns those that wait still. Where the stream has not diverged they stay as they are."""
        if not waiting:
            return []
        calls = calls_of(layer, self.pruned.states, self.pruned.kwargs[index])
        order = in_order(layer, [*waiting, before] if before else waiting, calls[0])
        due = order[: order.index(before)] if before in order else order
        if diverged:
            estimate_(layer, due, calls, [held_out == 0 for held_out in self.held_out])
        return [path for path in waiting if path not in due]

    def _kept(self, dense: torch.Tensor) -> torch.Tensor:
        """Of the dense stream what the pruned one should be."""
        return dense if self.channels is None else self.channels.of(dense)

    def _advance_pruned(self, index: int, layer: nn.Module) -> None:
        for batch, state in enumerate(self.pruned.states):
            self.pruned.states[batch] = layerwise.run(layer, state, self.pruned.kwargs[index][batch])[OUTPUT]

    def _narrow_(self, layer: nn.Module, sites: Sequence[Site]) -> None:
        """Cut all of a layer that the stream runs along but the columns of its readers, which get adapters."""
        if self.channels is not None:
            self._norms = {_end(s): bare(layer.get_submodule(_end(s))) for s in sites if s.row.norm_place}
            inside = self.channels.inside(sites[0].path)
            inside.cut_(layer, lambda module: True, [path for site in sites for path in readers(site)])

    def _adapt_(self, index: int, layer: nn.Module, site: Site, dense: Sequence[torch.Tensor], diverged: bool) -> bool:
        """Set right what a sublayer reads, as far as a linear map can."""
        solves = self.method == "least_squares"
        if self.channels is None:
            realigns = not is_convolution(layer.get_submodule(readers(site)[0]))
            return diverged and solves and realigns and self._realign_(index, layer, site, dense)
        modules: list[Any] = [layer.get_submodule(path) for path in readers(site)]
        has_bias = all(module.bias is not None for module in modules)
        sums = [self.channels.moments(has_bias, modules[0].weight.device) for _ in range(self._sets)]
        self._collect(sums, index, layer, readers(site)[0], dense)
        fold_(modules, self.channels.adapter(sums, solves), has_bias)
        return solves

    def _collect(
        self, sums: Sequence[Moments], index: int, layer: nn.Module, path: str, dense: Sequence[torch.Tensor]
    ) -> None:
        """Add what a module reads in the pruned stream, and what it reads in the dense one."""
        for batch, wanted in enumerate(dense):
            arguments = self.pruned.kwargs[index][batch]
            seen = layerwise.run(layer, self.pruned.states[batch], arguments, inputs_of=[path], stop_at=path)
            for moments, examples in self._by_set(sums, batch):
                x, y = (rows_of(value, self.masks[batch], examples) for value in (seen[path], wanted))
                moments.add(x, y, torch.zeros_like(y))

    def _realign_(self, index: int, layer: nn.Module, site: Site, dense: Sequence[torch.Tensor]) -> bool:
        """Refit an identity in front of a sublayer, from what it reads now to what it reads in the dense stream, and
        fold it into the matrices that read, if held-out error falls."""
        paths = self._of_one_input(index, layer, readers(site))
        modules: list[Any] = [layer.get_submodule(path) for path in paths]
        width, device = modules[0].weight.shape[input_axis(modules[0])], modules[0].weight.device
        has_bias = all(module.bias is not None for module in modules)
        sums = [Moments(width, width, has_bias, device) for _ in range(self._sets)]
        self._collect(sums, index, layer, paths[0], dense)
        identity = torch.eye(width, width + has_bias, device=device)
        found = refit(identity, sums[0], sums[1:], (0.0,))
        if found.accepted:
            fold_(modules, found.weight, has_bias)
        return found.accepted

    def _of_one_input(self, index: int, layer: nn.Module, paths: Sequence[str]) -> list[str]:
        """Of the modules that make units those that read what the first one does: in latent attention keys and queries
        are made of vectors of their own."""
        seen = layerwise.run(layer, self.pruned.states[0], self.pruned.kwargs[index][0], inputs_of=paths)
        first = seen.get(paths[0])
        same = [path for path in paths if first is not None and path in seen and seen[path].shape == first.shape]
        return [path for path in same if torch.equal(seen[path], seen[paths[0]])] or [paths[0]]

    def _site_(
        self, index: int, layer: nn.Module, upto: Sequence[Site], targets: Targets, is_last: bool
    ) -> dict[str, Any]:
        """Cut and repair the last of the sublayers `upto`; those before it are done."""
        site = upto[-1]
        if site.routed:
            return self._experts_(index, layer, upto, targets)
        planned = self.plan[site.key]
        consumer = layer.get_submodule(site.consumer)
        calibration, *held_out = self._moments(index, layer, upto, targets, matrix_of(consumer))
        if not planned.is_identity:
            cut_(layer, site, planned.axis, planned.kept)
            self._cut_arguments(index, site, planned)
        blends = BLENDS if targets is not None and site.row.norm_place != "inside" else (0.0,)
        result = self._solve(site, matrix_of(consumer), calibration, held_out, blends)
        set_matrix_(consumer, result.weight)
        report = {
            "site": site.name,
            "error_before": result.error_before,
            "error_after": result.error_after,
            "accepted": result.accepted,
            "ridge": result.ridge,
            "blend": result.blend,
        }
        if self.method == "least_squares" and site.row.norm_place and targets is not None and calibration.tokens:
            report["norm_refitted"] = self._norm_(index, layer, upto, targets, is_last)
        return report

    def _experts_(self, index: int, layer: nn.Module, upto: Sequence[Site], targets: Targets) -> dict[str, Any]:
        """`_site_` of experts, whose refit sees what all experts of a token give together."""
        site = upto[-1]
        wanted = self._wanted(index, layer, upto, targets)
        cut_(layer, site, self.plan[site.key].axis, self.plan[site.key].kept)
        module: Any = layer.get_submodule(site.consumer)
        report = {"site": site.name, "error_before": 0.0, "error_after": 0.0, "accepted": False}
        if self.method != "least_squares" or getattr(module, "has_post_expert_norm", False):
            return report
        found = refit_experts(down_matrices(module), self._routed(index, layer, site, wanted))
        set_down_matrices_(module, found.matrices)
        errors = {"error_before": found.error_before, "error_after": found.error_after}
        return report | errors | {"accepted": found.accepted > 0, "experts": found.accepted}

    def _wanted(
        self, index: int, layer: nn.Module, upto: Sequence[Site], targets: Targets
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of the real tokens of each batch, what the dense experts give in the pruned stream, and what is missing of
        the dense one besides; [n, D] each."""
        *done, site = upto
        found = []
        for batch, state in enumerate(self.pruned.states):
            ends = [*(_end(other) for other in done), site.consumer]
            arguments = self.pruned.kwargs[index][batch]
            seen = layerwise.run(layer, state, arguments, outputs_of=ends, stop_at=site.consumer)
            own = seen[site.consumer].view_as(state)
            rest = torch.zeros_like(own) if targets is None else targets[batch] - self._before(state, seen, done) - own
            found.append((rows_of(own, self.masks[batch]), rows_of(rest, self.masks[batch])))
        return found

    def _routed(
        self, index: int, layer: nn.Module, site: Site, wanted: Sequence[tuple[torch.Tensor, torch.Tensor]]
    ) -> Routed:
        """What the experts that remain read of all real tokens in the pruned stream."""
        module: Any = layer.get_submodule(site.consumer)
        weights = token_weights(self.gradients[site.key], self.masks) if site.key in self.gradients else []
        calls, sets, counts = [], [], []
        for batch, state in enumerate(self.pruned.states):
            arguments, mask = self.pruned.kwargs[index][batch], self.masks[batch]
            seen = layerwise.run(layer, state, arguments, inputs_of=[site.consumer], stop_at=site.consumer)
            calls.append(slots(module, Call.of(seen[site.consumer], mask)))
            examples = self.held_out[batch].repeat_interleave(state.shape[:-1].numel() // len(state))
            sets.append(examples if mask is None else examples[mask.to(examples.device)])
            alike = state.new_ones(state.shape[:-1].numel(), 1)  # rows that are only guarded by
            counts.append(rows_of(weights[batch] if batch < len(weights) else alike, mask))
        inputs, chosen = (torch.cat(each) for each in zip(*calls, strict=True))
        own, residual = (torch.cat(each) for each in zip(*wanted, strict=True))
        fitted = torch.cat(sets).to(own.device)
        return Routed(inputs, chosen, own, residual, fitted, torch.cat(counts) if weights else None)

    def _before(self, state: torch.Tensor, seen: Mapping[str, torch.Tensor], done: Sequence[Site]) -> torch.Tensor:
        """The pruned stream in front of a sublayer, from what the finished sublayers gave."""
        for site in done:
            if _end(site) in seen:
                state = _after(state, seen, site)
        return state

    def _moments(
        self, index: int, layer: nn.Module, upto: Sequence[Site], targets: Targets, dense: torch.Tensor
    ) -> list[Moments]:
        """Of the rows that the repair is fitted to, and of each held-out set."""
        *done, site = upto
        path, consumer = site.consumer, layer.get_submodule(site.consumer)
        channels = kept_columns(site, self.plan[site.key].axis, self.plan[site.key].kept)
        kept = columns_of(channels, area(consumer)).to(dense.device)
        sums = [Moments(len(dense), len(kept), site.has_bias, dense.device) for _ in range(self._sets)]
        columns = site.columns * area(consumer)
        weight, bias = dense[:, :columns], dense[:, -1] if site.has_bias else None
        weights = token_weights(self.gradients[site.key], self.masks) if site.key in self.gradients else []
        for batch, state in enumerate(self.pruned.states):
            arguments = self.pruned.kwargs[index][batch]
            ends = [_end(other) for other in done]
            seen = layerwise.run(layer, state, arguments, inputs_of=[path], outputs_of=ends, stop_at=path)
            if path not in seen:
                continue
            for moments, examples in self._by_set(sums, batch):
                x = rows_of(read_rows(consumer, seen[path]), self.masks[batch], examples)
                own = functional.linear(x, weight, bias)
                if targets is None or site.row.norm_place == "inside":
                    residual = torch.zeros_like(own)  # behind a norm only the own target is linear in W
                else:
                    wanted = self._kept(targets[batch]) - self._before(state, seen, done)
                    residual = rows_of(wanted, self.masks[batch], examples) - own
                weight_of = rows_of(weights[batch], self.masks[batch], examples) if batch < len(weights) else None
                moments.add(x[:, kept], own, residual, weight_of)
        return sums

    @property
    def _sets(self) -> int:
        """How many sets of examples there are: those that repairs are fitted to, and the held-out ones."""
        return 1 + max(int(held_out.max()) for held_out in self.held_out)

    def _by_set(self, sums: Sequence[Sums], batch: int) -> Iterator[tuple[Sums, torch.Tensor]]:
        """The sums of each set that has examples in a batch, with a mask of them [B]."""
        for number in self.held_out[batch].unique().tolist():
            yield sums[number], self.held_out[batch] == number

    def _solve(
        self,
        site: Site,
        weight: torch.Tensor,
        calibration: Moments,
        held_out: Sequence[Moments],
        blends: Sequence[float],
    ) -> Refit:
        if self.method == "none":
            return best_of(weight, (), held_out)
        if self.method == "bias":
            return shift_bias(weight, calibration, held_out)
        if self.method == "rescale":
            columns = weight.shape[1] - site.has_bias
            return rescale(weight, calibration, held_out, columns // len(self.plan[site.key].kept))
        if 0 < calibration.tokens < TOKENS_A_COLUMN * weight.shape[1]:
            warnings.warn(
                f"{calibration.tokens} calibration tokens to refit {weight.shape[1]} columns (at least "
                f"{TOKENS_A_COLUMN} a column are advised): the refit is held closer to the original weights. "
                "Give more or longer examples.",
                stacklevel=2,
            )
        return refit(weight, calibration, held_out, blends)

    def _cut_arguments(self, index: int, site: Site, planned: Kept) -> None:
        """Slice what carries units of this axis (T5's position bias) for the layer as it is now cut."""
        for batch, arguments in enumerate(self.pruned.kwargs[index]):
            self.pruned.kwargs[index][batch] = cut_arguments(arguments, site, planned.axis, planned.kept)

    def _norm_(
        self, index: int, layer: nn.Module, upto: Sequence[Site], targets: Sequence[torch.Tensor], is_last: bool
    ) -> bool:
        """Refit scale (and shift) of the norm behind the last of the sublayers `upto`, if held-out error falls.

        Where that norm ends the layer, the pruned stream has then been through it.
        """
        *done, site = upto
        norm: Any = layer.get_submodule(_end(site))
        has_shift = getattr(norm, "bias", None) is not None
        sums = [ChannelSums(len(norm.weight), norm.weight.device) for _ in range(self._sets)]
        self._advanced = is_last and site.row.norm_place == "after"
        for batch, state in enumerate(self.pruned.states):
            arguments = self.pruned.kwargs[index][batch]
            ends = [_end(other) for other in upto]
            seen = layerwise.run(layer, state, arguments, outputs_of=ends, stop_at=_end(site))
            output = seen[_end(site)].view_as(state)
            if site.row.norm_place == "inside":
                wanted = self._kept(targets[batch]) - self._before(state, seen, done)
            else:  # what it gives in the dense stream, which is behind the last sublayer, and behind a gap
                whole = self._norms.get(_end(site), norm)
                wanted = self._kept(self.dense.states[batch] if is_last else whole(targets[batch]))
            for total, examples in self._by_set(sums, batch):
                total.add(*(rows_of(value, self.masks[batch], examples) for value in (output, wanted)))
            if self._advanced:
                self.pruned.states[batch] = output
        fitted = refit_channels(sums[0], sums[1:], has_shift)
        if fitted is None:
            return False
        rescale_norm_(norm, fitted, self.norm_offset)
        scale, shift = fitted
        for batch, output in enumerate(self.pruned.states if self._advanced else ()):
            self.pruned.states[batch] = (output * scale + shift).to(output.dtype)
        return True


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding, in whatever precision."""
    return bool((a - b).abs().max() <= 0.02 * b.abs().max())


def _end(site: Site) -> str:
    """The module whose output makes the stream behind a sublayer."""
    return site.row.norm if site.row.norm_place and site.row.norm else site.consumer


def _after(state: torch.Tensor, seen: Mapping[str, torch.Tensor], site: Site) -> torch.Tensor:
    """The stream behind a sublayer: what its norm gives (post-LN), or the sum."""
    output = seen[_end(site)].view_as(state)
    return output if site.row.norm_place == "after" else state + output


def improvement(reports: Sequence[Mapping[str, Any]]) -> float:
    """Geometric mean over sites of held-out error after / before the repair."""
    ratios = [r["error_after"] / r["error_before"] for r in reports if r["error_before"] > 0 and r["error_after"] > 0]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else 1.0
