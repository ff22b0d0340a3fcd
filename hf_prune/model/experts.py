"""A layer of experts taken apart: what each token's experts make of it, one after the other.

It stands on the interface that transformers gives all its experts (`transformers.integrations.moe`): weights of all
experts in one tensor, called with the tokens, the experts that each is sent to, and the weights of their sum.

Shapes: n tokens, k experts of a token, E experts, I neurons of each, D hidden width, B examples.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from .cut import put_
from .offload import real
from .patched import computing


@dataclass(frozen=True)
class Call:
    """What a layer of experts is called with."""

    hidden: torch.Tensor  # [n, D]
    index: torch.Tensor  # which experts a token is sent to, [n, k]
    weights: torch.Tensor  # of their sum, [n, k]

    @classmethod
    def of(cls, given: tuple[Any, ...], mask: torch.Tensor | None = None) -> Call:
        """From a module's arguments; at real tokens alone where there is a mask [n]."""
        hidden, index, weights = given
        rows = slice(None) if mask is None else mask.to(hidden.device)
        return cls(hidden.reshape(-1, hidden.shape[-1])[rows], index[rows], weights[rows])

    def by_expert(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Each expert that sees tokens, their rows, and which of a token's experts it is there; [m] each."""
        for expert in self.index.unique().tolist():
            rows, places = (self.index == expert).nonzero(as_tuple=True)
            yield expert, rows, places


def is_known(module: Any) -> bool:
    """Whether a module is called as above, so that it can be taken apart."""
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "down_proj"))


def neurons(module: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """What the down projection of one expert reads, [m, I]. hidden: [m, D]."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    made = _linear(module, name, expert, hidden)
    found: torch.Tensor = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    return found


def outputs(module: Any, expert: int, neurons: torch.Tensor) -> torch.Tensor:
    """What one expert makes of its neurons, [m, D]. neurons: [m, I]."""
    made = _linear(module, "down_proj", expert, neurons)
    return module.post_expert_norm(made) if getattr(module, "has_post_expert_norm", False) else made


def _linear(module: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return functional.linear(x, weight.T if module.is_transposed else weight, bias)


def contributions(module: Any, call: Call) -> torch.Tensor:
    """What each of its experts adds to a token, [n, k, D]."""
    found = call.hidden.new_zeros(*call.index.shape, call.hidden.shape[-1])
    for expert, rows, places in call.by_expert():
        made = outputs(module, expert, neurons(module, expert, call.hidden[rows]))
        found[rows, places] = (made * call.weights[rows, places, None]).to(found.dtype)
    return found


def slots(module: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What the down projections of a token's experts read, times their weights (and these, where there is a bias), in
    fp32 [n, k, S]; and which experts they are [n, k]."""
    width = module.down_proj.shape[1 if module.is_transposed else 2]
    found = torch.zeros(*call.index.shape, width, device=call.hidden.device)
    for expert, rows, places in call.by_expert():
        found[rows, places] = neurons(module, expert, call.hidden[rows]).float()
    weights = call.weights.float()[..., None]
    return (torch.cat([found * weights, weights], -1) if module.has_bias else found * weights), call.index


def down_matrices(module: Any) -> torch.Tensor:
    """The down projections [E, D, S] in fp32, with the bias as last column where there is one."""
    weight = module.down_proj.detach().float()
    weight = weight.transpose(1, 2) if module.is_transposed else weight
    return torch.cat([weight, module.down_proj_bias.detach().float()[..., None]], -1) if module.has_bias else weight


def set_down_matrices_(module: Any, matrices: torch.Tensor) -> None:
    """Put back what `down_matrices` gave, in the weights' own dtype."""
    if module.has_bias:
        put_(module, "down_proj_bias", matrices[..., -1])
        matrices = matrices[..., :-1]
    put_(module, "down_proj", matrices.transpose(1, 2) if module.is_transposed else matrices)


@contextlib.contextmanager
def gated(module: Any, gate: torch.Tensor) -> Iterator[None]:
    """A layer of experts with each expert's output (gate [B, E]) or each neuron (gate [B, E*I]) multiplied by its gate,
    in fp32. Hooks and forward() are as before afterwards. Offloaded weights are loaded for each call."""
    experts = len(module.down_proj)
    gates = gate.view(len(gate), experts, -1)

    def scaled(x: torch.Tensor, expert: int, rows: torch.Tensor, tokens: int) -> torch.Tensor:
        examples = rows // (tokens // len(gates))
        return (x.float() * gates.to(x.device)[examples, expert]).to(x.dtype)

    def forward(*given: Any) -> torch.Tensor:
        call = Call.of(given)
        total = torch.zeros_like(call.hidden)
        with real(module):
            for expert, rows, places in call.by_expert():
                inner = neurons(module, expert, call.hidden[rows])
                if gates.shape[2] > 1:
                    inner = scaled(inner, expert, rows, len(total))
                made = outputs(module, expert, inner)
                if gates.shape[2] == 1:
                    made = scaled(made, expert, rows, len(total))
                total = total.index_add(0, rows, (made * call.weights[rows, places, None]).to(total.dtype))
        return total

    with computing(module, forward):
        yield
