"""Which channels of a network belong together, so that pruning a filter can shrink the network.

A *unit* is a set of channels that several tensors share: the rows of a layer, its bias, the BatchNorm behind it
and the columns of every layer that reads it; layers whose outputs are added are one unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from .spec import MaskSpec, select
from .tracing import bare, walk


@dataclass(frozen=True, slots=True)
class Segment:
    """Channel c of `unit` governs the entries offset + c*block ... offset + (c+1)*block - 1 of a dimension."""

    unit: int
    block: int
    offset: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A floating tensor of the state dict.

    Attributes
    ----------
    name, shape
        Its name and shape in the full network.
    dims
        (dimension, segments) for each dimension that units govern; the segments cover the dimension.
    fill
        What a pruned entry holds in the full network: 1 for a running variance, else 0.
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[tuple[int, tuple[Segment, ...]], ...] = ()
    fill: float = 0.0

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def segments(self, dim: int) -> tuple[Segment, ...]:
        """Segments along `dim`; ``()`` if no unit governs it."""
        return dict(self.dims).get(dim, ())

    @property
    def unit(self) -> int | None:
        """The unit whose channels are the rows of this weight; None for vectors and mixed rows."""
        rows = self.segments(0)
        return rows[0].unit if len(self.shape) >= 2 and len(rows) == 1 else None


@dataclass(frozen=True, slots=True)
class Coupling:
    """The units of a network and the tensors they govern.

    Attributes
    ----------
    channels
        Channels of each unit; units are numbered in the order in which the network computes them.
    prunable
        Whether a unit may lose channels. Units that reach the output, weights that are used twice or tied, and
        whatever enters or leaves an operation that is not understood are not prunable.
    entries
        Every floating tensor of the state dict, in its order.
    """

    channels: tuple[int, ...]
    prunable: tuple[bool, ...]
    entries: tuple[Entry, ...]

    @property
    def numel(self) -> int:
        """Number of floating values in the state dict."""
        return sum(entry.numel for entry in self.entries)

    def spec(self, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> MaskSpec:
        """Make a filter mask, one bit per channel of each unit that the patterns select.

        A unit is taken only if the patterns (see `MaskSpec.of`) select every weight whose rows are its channels:
        excluding one member leaves the whole unit out, as its channels could not go otherwise.

        Raises
        ------
        ValueError
            No unit is left, or a pattern matches nothing; the message lists the candidates.
        """
        rows = {e.name: {s.unit for s in e.segments(0)} for e in self.entries if len(e.shape) >= 2}
        candidates = [name for name, units in rows.items() if any(self.prunable[u] for u in units)]
        chosen = select(candidates, [e.name for e in self.entries], include, exclude)
        out = {u for name in candidates if name not in chosen for u in rows[name]}
        owners = {e.unit for e in self.entries}
        units = [u for u, ok in enumerate(self.prunable) if ok and u not in out and u in owners]
        number = {u: i for i, u in enumerate(units)}
        taken = [(e, number[e.unit]) for e in self.entries if e.unit in number]
        if not taken:
            raise ValueError(
                f"include={tuple(include)} exclude={tuple(exclude)} leave a member of every unit out, and a unit "
                f"is pruned as a whole; candidates: {', '.join(candidates)}"
            )
        return MaskSpec(
            tuple(e.name for e, _ in taken),
            tuple(e.shape for e, _ in taken),
            "filter",
            tuple(unit for _, unit in taken),
        )


def couple(model: nn.Module, in_shape: Sequence[int] | None = None) -> Coupling:
    """Trace a network and find which channels belong together; nothing is computed, the model is not changed.

    Handled: convolutions, linear layers and BatchNorm; activations, pooling and dropout, as modules, functions
    or methods; flatten; sums, products and concatenations. The units that enter or leave anything else are not
    prunable, which is always safe. Activations are batched, with the examples along dimension 0.

    Parameters
    ----------
    in_shape
        Shape of one example of the first input, of which only the number of dimensions is used. It is needed for a
        network of linear layers with BatchNorm that does not begin with a flatten: without it (features) cannot be
        told from (time, features), where BatchNorm runs over time, and its units are then not prunable.

    Raises
    ------
    ValueError
        The model cannot be traced.
    """
    model = bare(model)
    board = walk(model, None if in_shape is None else len(in_shape) + 1)
    roots = sorted({board.find(unit) for unit in range(len(board.channels))})
    number = {unit: i for i, unit in enumerate(roots)}
    fixed = {board.find(unit) for unit in board.fixed}

    def segments(runs: tuple[tuple[int, int], ...]) -> tuple[Segment, ...]:
        found, offset = [], 0
        for unit, block in runs:
            found.append(Segment(number[board.find(unit)], block, offset))
            offset += board.channels[unit] * block
        return tuple(found)

    entries = [
        Entry(
            name,
            tuple(t.shape),
            tuple((dim, segments(runs)) for dim, runs in sorted(board.governed.get(name, {}).items())),
            1.0 if name in board.governed and name.endswith("running_var") else 0.0,
        )
        for name, t in model.state_dict().items()
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return Coupling(
        tuple(board.channels[unit] for unit in roots), tuple(unit not in fixed for unit in roots), tuple(entries)
    )
