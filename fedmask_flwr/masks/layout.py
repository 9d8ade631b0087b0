"""Where the channels of an activation lie, and which of them are tied; what is not understood is fixed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import final

from torch import fx

Run = tuple[int, int]  # (unit, block): the channels of a unit, each `block` entries long


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the channels of an activation lie.

    Attributes
    ----------
    units
        Units side by side along `axis`; ``()``: nothing is known of the channels.
    rank, axis
        Number of dimensions with the batch, None if unknown; then axis is -1.
    block
        Entries per channel along `axis`; None after a flatten, until a layer's width tells it.
    zero
        A pruned channel is exactly 0 here.
    batch
        Dimension 0 is the batch.
    """

    units: tuple[int, ...] = ()
    rank: int | None = None
    axis: int = -1
    block: int | None = 1
    zero: bool = True
    batch: bool = False


UNKNOWN = Layout()


@final
class Board:
    """What is known in the middle of a walk over a traced network.

    Units are numbered in the order in which layers make them; united ones go by the lowest number.

    Attributes
    ----------
    channels
        Channels of each unit.
    fixed
        Units that cannot lose a channel.
    governed
        Tensor name -> dimension -> the units along it.
    values
        The layout of each activation.
    """

    def __init__(self, names: Container[str]) -> None:
        self.channels: list[int] = []
        self.fixed: set[int] = set()
        self.governed: dict[str, dict[int, tuple[Run, ...]]] = {}
        self.values: dict[fx.Node, Layout] = {}
        self.names = names
        self._parent: list[int] = []

    def find(self, unit: int) -> int:
        """The number that `unit` goes by."""
        while self._parent[unit] != unit:
            unit = self._parent[unit]
        return unit

    def new(self, channels: int, rank: int | None, axis: int, batch: bool, fixed: bool) -> Layout:
        """Make a unit: the output of a layer."""
        unit = len(self.channels)
        self.channels.append(channels)
        self._parent.append(unit)
        if fixed:
            self.fixed.add(unit)
        return Layout((unit,), rank, axis, batch=batch)

    def govern(self, name: str, dim: int, x: Layout, block: int = 1) -> None:
        """Let the units of `x` govern a dimension of a tensor, if there is such a tensor."""
        if name in self.names:
            self.governed.setdefault(name, {})[dim] = tuple((unit, block) for unit in x.units)

    def unknown(self, node: fx.Node) -> Layout:
        """Fix whatever enters `node`; nothing is known of what leaves it."""
        for n in node.all_input_nodes:
            self.fixed.update(self.values[n].units)
        return UNKNOWN

    def sole(self, node: fx.Node) -> Layout | None:
        """The layout of the first argument, if it is the only activation that enters."""
        inputs = node.all_input_nodes
        return self.values[inputs[0]] if len(inputs) == 1 and node.args[:1] == (inputs[0],) else None

    def width(self, x: Layout) -> int:
        """Channels of `x`; 0 if they are unknown."""
        return sum(self.channels[unit] for unit in x.units)

    def block(self, x: Layout, features: int) -> int | None:
        """Entries per channel if `features` entries hold the channels of `x`; None if they cannot."""
        width = self.width(x)
        if not width or features % width or x.block not in (None, features // width):
            return None
        return features // width

    def unite(self, node: fx.Node) -> Layout | None:
        """Tie the channels of the two activations that enter `node` together, if they have the same shape."""
        args = [arg for arg in node.args if isinstance(arg, fx.Node)]
        if len(args) != 2 or len(node.args) != 2 or node.kwargs:
            return None
        a, b = (self.values[arg] for arg in args)
        widths = [[self.channels[unit] for unit in x.units] for x in (a, b)]
        if not a.units or widths[0] != widths[1] or (a.rank, a.axis) != (b.rank, b.axis):
            return None
        if None not in (a.block, b.block) and a.block != b.block:
            return None
        for u, v in zip(a.units, b.units, strict=True):
            low, high = sorted((self.find(u), self.find(v)))
            self._parent[high] = low
        block = b.block if a.block is None else a.block
        return replace(a, block=block, zero=a.zero and b.zero, batch=a.batch and b.batch)
