"""Models whose layers work on maps of pixels: at how many positions of one image each matrix is applied.

Found by a pass of shapes alone: every weight is on the meta device, where nothing is computed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .offload import unhooked
from .outside import is_matrix
from .patches import is_convolution
from .weights import quiet

IMAGE = 224  # side of an image where the config names none (ResNet, RegNet): that of ImageNet


def image_sides(config: Any) -> tuple[int, int]:
    """Height and width of an image; `IMAGE` where the config does not say."""
    size = getattr(config, "image_size", None) or IMAGE
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


@torch.no_grad()
def positions(model: Any) -> dict[str, int]:
    """How often each convolution and each linear module is applied to one image, by its path."""
    found: dict[str, int] = {}
    image = torch.empty(1, model.config.num_channels, *image_sides(model.config), device="meta", dtype=model.dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    with quiet(model), unhooked(model), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if applies(module):
                hooks.callback(module.register_forward_hook(_count(name, found)).remove)
        functional_call(model, shapes, (), {"pixel_values": image})
    return found


def _count(name: str, found: dict[str, int]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        places = output.shape[2:] if is_convolution(module) else output.shape[1:-1]
        found[name] = found.get(name, 0) + places.numel()

    return hook


def applies(module: Any) -> bool:
    """Whether a module multiplies by a matrix."""
    return is_convolution(module) or is_matrix(module)


def matrices_of(model: nn.Module, path: str = "") -> dict[str, int]:
    """Elements of the weights that are multiplied by, of all modules under a path."""
    inside = model.get_submodule(path).named_modules(prefix=path)
    return {name: module.weight.numel() for name, module in inside if applies(module)}
