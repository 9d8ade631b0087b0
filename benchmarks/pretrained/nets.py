"""The two pretrained networks, whole or from some block on, as builders for the run config's `model`.

    model = "benchmarks.pretrained.nets:mobilenetv2(first=17)"
    model = "benchmarks.pretrained.nets:resnet20(first=3)"

What lies before the first trained block never changes, so `prepare.py` computes it once per image; the tail keeps
the names and the order of the whole network, so patterns, checkpoints and masks are the same for both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu


class StoredNorm(nn.BatchNorm2d):
    """Batch norm that always uses its stored statistics, whatever is trained."""

    def train(self, mode: bool = True) -> StoredNorm:
        return super().train(False)


def mobilenetv2(in_shape: Sequence[int], num_classes: int, first: int = 0) -> nn.Module:
    """Torchvision's MobileNetV2 from ``features.<first>`` on; 0: all of it."""
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2(num_classes=num_classes, norm_layer=StoredNorm)
    blocks = list(net.features.named_children())[first:]
    net.features = nn.Sequential(OrderedDict(blocks))
    return _takes(net, in_shape)


def resnet20(in_shape: Sequence[int], num_classes: int, first: int = 0) -> nn.Module:
    """CIFAR's ResNet-20 from ``layer<first>`` on; 0: all of it."""
    return _takes(ResNet20(num_classes, first), in_shape)


class Block(nn.Module):
    """Two 3x3 convolutions; where the width doubles, the shortcut is every second pixel and zeros."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.stride = width // before
        self.conv1 = nn.Conv2d(before, width, 3, self.stride, 1, bias=False)
        self.bn1 = StoredNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = StoredNorm(width)
        self.more = (width - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        inside = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return relu(inside + pad(short, (0, 0, 0, 0, self.more, self.more)))


class ResNet20(nn.Module):
    """He et al.'s network for CIFAR, arXiv 1512.03385: 16, 32 and 64 channels, three blocks each."""

    def __init__(self, num_classes: int, first: int = 0) -> None:
        super().__init__()
        self.first = first
        if first == 0:
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = StoredNorm(16)
        for n, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            if n >= first:
                stage = nn.Sequential(Block(before, width), Block(width, width), Block(width, width))
                self.add_module(f"layer{n}", stage)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.first == 0:
            x = relu(self.bn1(self.conv1(x)))
        for n in range(max(self.first, 1), 4):
            x = self.get_submodule(f"layer{n}")(x)
        return self.linear(x.mean((2, 3)))


def _takes(net: nn.Module, in_shape: Sequence[int]) -> nn.Module:
    if len(in_shape) != 3:
        raise ValueError(f"expected (channels, height, width), got {tuple(in_shape)}: run prepare.py")
    return net


@torch.no_grad()
def before(net: nn.Module, kind: str, first: int, x: Tensor) -> Tensor:
    """What the tail from ``first`` on is given: activations of the whole network ``net`` for images ``x``."""
    if kind == "mobilenetv2":
        return net.features[:first](x)
    x = relu(net.bn1(net.conv1(x)))
    for n in range(1, first):
        x = net.get_submodule(f"layer{n}")(x)
    return x
