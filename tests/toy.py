"""A model of structures that no family here has, and its row: what a cut, a mask and a checkpoint must follow alone.

Each layer has a convolution with batch normalisation, whose channels go, and experts in one three-dimensional tensor,
which go whole or each narrower; layers and tokens go too.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from hf_prune.model.axes import Axis, Family, Part, Stack, Sublayer


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(
        self, vocab_size=40, hidden_size=16, num_layers=4, channels=12, num_experts=5, expert_width=6, **kwargs
    ):
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        self.channels, self.num_experts, self.expert_width = channels, num_experts, expert_width


class Convolution(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.into = nn.Conv1d(config.hidden_size, config.channels, 3, padding=1)
        self.norm = nn.BatchNorm1d(config.channels)
        self.out = nn.Conv1d(config.channels, config.hidden_size, 1)

    def forward(self, hidden):
        return self.out(torch.relu(self.norm(self.into(hidden.transpose(1, 2))))).transpose(1, 2)


class Experts(nn.Module):
    """Every token goes through all experts, weighed by a sigmoid of its own each."""

    def __init__(self, config):
        super().__init__()
        experts, hidden, width = config.num_experts, config.hidden_size, config.expert_width
        self.router = nn.Parameter(torch.randn(experts, hidden) / 4)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden) / 4)  # gate and up alternate
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / 4)

    def forward(self, hidden):
        gate, up = torch.einsum("ekd,btd->btek", self.gate_up, hidden).unflatten(-1, (-1, 2)).unbind(-1)
        weights = (hidden @ self.router.T).sigmoid()
        return torch.einsum("edk,btek,bte->btd", self.down, gate.tanh() * up, weights)


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.convolution = Convolution(config)
        self.experts = Experts(config)

    def forward(self, hidden):
        hidden = hidden + self.convolution(hidden)
        return hidden + self.experts(hidden)


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012  as transformers wants it

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=self.head(hidden))


CHANNELS = Sublayer(
    "convolution",
    (Axis("channels", "channels"),),
    (
        Part("convolution.into.weight", 0, ("channels",)),
        Part("convolution.into.bias", 0, ("channels",), "carries"),
        *(
            Part(f"convolution.norm.{name}", 0, ("channels",), "carries")
            for name in ("weight", "bias", "running_mean", "running_var")
        ),
        Part("convolution.out.weight", 1, ("channels",), "reads"),
    ),
)
EXPERTS = Sublayer(
    "experts",
    (Axis("experts", "num_experts"),),
    (
        Part("experts.router", 0, ("experts",)),
        Part("experts.gate_up", 0, ("experts",)),
        Part("experts.down", 0, ("experts",), "reads"),
    ),
)
WIDTHS = Sublayer(
    "expert_ffn",
    (Axis("neurons", "expert_width"),),
    (
        Part("experts.gate_up", 1, ("neurons",), times=2),
        Part("experts.down", 2, ("neurons",), "reads"),
    ),
)
ROW = Family("toy", (Stack("decoder", "layers", Axis("layers", "num_layers"), (CHANNELS, EXPERTS, WIDTHS)),))


def toy_model(seed=0):
    torch.manual_seed(seed)
    model = ToyModel(ToyConfig())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
        model.embed.weight.normal_()
    return model.eval()
