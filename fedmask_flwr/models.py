"""Small networks for images, sensor windows and vectors, as plain modules; larger ones come from torchvision.

Every builder is ``builder(in_shape, num_classes, **options) -> nn.Module``; `in_shape` is the shape of
one example: (channels, height, width) for the convolutional ones, (channels, time) for `har`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from .masks import Backbone
from .masks.backbone import Option

_SPELLED = re.compile(r"(?P<name>[^()\s]+)(?:\((?P<inner>[^()]*)\))?")
MODELS: dict[str, str] = {
    "conv4": "fedmask_flwr.models:conv4",
    "conv6": "fedmask_flwr.models:conv6",
    "har": "fedmask_flwr.models:har",
    "leaf": "fedmask_flwr.models:leaf",
    "lenet5": "fedmask_flwr.models:lenet5",
    "made": "fedmask_flwr.made:made",
    "mlp": "fedmask_flwr.models:mlp",
}


def mlp(in_shape: Sequence[int], num_classes: int, hidden: int | Sequence[int] = (300, 100)) -> nn.Module:
    """Fully connected ReLU network on the flattened input; LeNet-300-100 by default.

    Raises
    ------
    ValueError
        A layer without inputs or outputs.
    """
    widths = [prod(in_shape), *([hidden] if isinstance(hidden, int) else hidden)]
    if min(*widths, num_classes) < 1:
        raise ValueError(f"an mlp of {widths} inputs and {num_classes} classes: each must be 1 or more")
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], num_classes))


def lenet5(in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """LeNet-5 with ReLU and max pooling; 28-pixel images are padded to 32 as in the original.

    Raises
    ------
    ValueError
        `in_shape` is no image shape, or smaller than 12 pixels.
    """
    channels, height, width = _image(in_shape, 12)
    pad = 2 if min(height, width) <= 28 else 0
    h, w = (((side + 2 * pad - 4) // 2 - 4) // 2 for side in (height, width))
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=pad),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * h * w, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


def leaf(in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """The image CNN of LEAF (arXiv:1812.01097), small: same 5x5 convolutions of 32 and 64, then 128-classes.

    Raises
    ------
    ValueError
        `in_shape` is no image shape, or smaller than 4 pixels.
    """
    channels, height, width = _image(in_shape, 4)
    return nn.Sequential(
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def har(in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """1-D CNN for sensor windows (channels, time): same convolutions of 32, 64 and 64, then 128-classes.

    Any window length gives the same weights: the last feature maps are averaged to 8 steps.

    Raises
    ------
    ValueError
        `in_shape` is not (channels, time), or shorter than 4 steps.
    """
    if len(in_shape) != 2 or min(in_shape) < 1 or in_shape[1] < 4:
        raise ValueError(
            f"expected (channels, time) with at least 4 steps, got {tuple(in_shape)}: "
            "use 'leaf' for images, 'mlp' for vectors"
        )
    return nn.Sequential(
        nn.Conv1d(in_shape[0], 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(64, 64, 5, padding=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(8),
        nn.Flatten(),
        nn.Linear(64 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def conv4(in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """FedPM's Conv-4: 64, 64, 128, 128 channels, then 256-256-classes.

    Raises
    ------
    ValueError
        `in_shape` is no image shape, or smaller than 4 pixels.
    """
    return _conv(in_shape, num_classes, (64, 128))


def conv6(in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """FedPM's Conv-6: 64, 64, 128, 128, 256, 256 channels, then 256-256-classes.

    Raises
    ------
    ValueError
        `in_shape` is no image shape, or smaller than 8 pixels.
    """
    return _conv(in_shape, num_classes, (64, 128, 256))


def _conv(in_shape: Sequence[int], num_classes: int, blocks: Sequence[int]) -> nn.Module:
    """Blocks of two same 3x3 convolutions and a 2x2 max pool, then two hidden layers of 256."""
    shrink = 2 ** len(blocks)
    channels, height, width = _image(in_shape, shrink)
    layers: list[nn.Module] = []
    for out in blocks:
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(out, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    flat = channels * (height // shrink) * (width // shrink)
    layers += [nn.Flatten(), nn.Linear(flat, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, num_classes))


def _image(in_shape: Sequence[int], smallest: int) -> tuple[int, int, int]:
    if len(in_shape) != 3 or min(in_shape) < 1 or min(in_shape[1:]) < smallest:
        raise ValueError(
            f"expected (channels, height, width) with sides of at least {smallest}, got {tuple(in_shape)}: "
            "use 'mlp' for vectors"
        )
    channels, height, width = in_shape
    return channels, height, width


def spelled(text: str) -> tuple[str, dict[str, Option]]:
    """Take ``name(key=value key=value)`` apart; values as in TOML, bare words, or numbers between commas.

    Raises
    ------
    ValueError
        The text is neither that nor a name alone.
    """
    found = _SPELLED.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"cannot read model {text!r}: write NAME, or NAME(KEY=VALUE KEY=VALUE)")
    options: dict[str, Option] = {}
    for word in (found["inner"] or "").split():
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier() or not value or key in options:
            raise ValueError(f"cannot read {word!r} in model {text!r}: write each KEY=VALUE once, with no spaces")
        options[key] = _option(value)
    return found["name"], options


def _option(text: str) -> Option:
    if "," in text:
        return tuple(_option(part) for part in text.split(",") if part)
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except ValueError:
        return text  # a bare word
    return value if isinstance(value, int | float | str) else text


def backbone(model: str, source: str, in_shape: Sequence[int], num_classes: int, **options: Option) -> Backbone:
    """Name a network by a short name, a torchvision name or a dotted path.

    Parameters
    ----------
    model
        A key of `MODELS`, ``"torchvision:<name>"`` (takes 3-channel images; `in_shape` is not passed
        on), or ``"pkg.mod:builder"`` for a builder with this module's signature. Further arguments of the builder
        follow in parentheses: ``mlp(hidden=300,100)``, ``made(hidden=110 masks=8 connect=cycle)``.
    source
        The frozen weights, see `Backbone`.
    options
        Further keyword arguments of the builder; they win over those in parentheses.

    Raises
    ------
    ValueError
        Unknown name, malformed source, or a shape that the model cannot take.
    """
    model, written = spelled(model)
    options = {**written, **options}
    if model.startswith("torchvision:"):
        if len(in_shape) != 3 or in_shape[0] != 3:
            raise ValueError(f"{model} takes images of shape (3, height, width), not {tuple(in_shape)}")
        return Backbone(model, source, (("num_classes", num_classes), *options.items()))
    arch = MODELS.get(model, model)
    if ":" not in arch:
        names = ", ".join(MODELS)
        raise ValueError(f"unknown model {model!r}: use {names}, 'torchvision:<name>' or 'pkg.mod:builder'")
    named = {"in_shape": tuple(in_shape), "num_classes": num_classes, **options}
    return Backbone(arch, source, tuple(named.items()))
