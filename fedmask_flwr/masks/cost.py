"""What a network costs: its parameters and multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .tracing import CONVS, bare, modes


def count_parameters(model: nn.Module) -> int:
    """Count the parameters, trainable or not; tied ones once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, in_shape: Sequence[int]) -> int:
    """Count the multiply-accumulates of convolution and linear layers for one example of shape `in_shape`.

    The model runs once, in evaluation mode, on zeros of its own dtype and device; nothing in it changes. Other
    layers and additions of biases are not counted.
    """
    total, batch = 0, 2  # BatchNorm on batch statistics needs more than one value a channel

    def count(module: nn.Module, _: Any, out: Tensor) -> None:
        nonlocal total
        assert isinstance(module.weight, Tensor)
        total += out.numel() * prod(module.weight.shape[1:])

    layers = [m for m in model.modules() if isinstance(m, (*CONVS, nn.Linear))]
    hooks = [m.register_forward_hook(count) for m in layers]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    try:
        with modes(model, False):
            bare(model)(like.new_zeros(batch, *in_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return total // batch
