"""Walk a traced network, layer by layer, and note which units govern which of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from torch import Tensor, fx, nn

from .layout import UNKNOWN, Board, Layout
from .rules import call, flatten, simple

Norm: TypeAlias = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RANKS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def bare(model: nn.Module) -> nn.Module:
    """The module under `torch.compile`, or the model itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


@contextmanager
def modes(model: nn.Module, training: bool) -> Iterator[None]:
    """Set every module's training flag, past any override of ``train``; put them back afterwards."""
    flags = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def trace(model: nn.Module) -> fx.Graph:
    """Trace in training mode, so that auxiliary heads are seen too.

    Raises
    ------
    ValueError
        The model's ``forward`` cannot be traced.
    """
    with modes(model, True):
        try:
            return fx.Tracer().trace(model)
        except Exception as error:
            raise ValueError(
                f"cannot trace {type(model).__name__}: {error}. Its forward must be free of control flow that "
                "depends on tensors: hide such a part behind torch.fx.wrap, or couple the traceable part of "
                "the model alone"
            ) from error


def walk(model: nn.Module, rank: int | None) -> Board:
    """Trace `model` and carry the channels through it; `rank` is that of the first input, if known.

    Raises
    ------
    ValueError
        The model cannot be traced.
    """
    nodes = trace(model).nodes
    state = model.state_dict(keep_vars=True)
    owners = Counter(id(t) for t in state.values())
    board = Board({name for name, t in state.items() if isinstance(t, Tensor) and owners[id(t)] == 1})
    calls = Counter(id(model.get_submodule(str(node.target))) for node in nodes if node.op == "call_module")
    layers = _Layers(board, model, calls)
    inputs = [Layout(rank=rank, batch=True)]
    for node in nodes:
        if node.op == "placeholder":
            value = inputs.pop() if inputs else UNKNOWN
        elif node.op == "call_module":
            value = layers.call(node)
        elif node.op in ("call_function", "call_method"):
            value = call(board, node)
        else:  # a parameter that forward reads, or the output
            value = board.unknown(node)
        board.values[node] = value
    for node in nodes:
        if node.op == "get_attr":
            for runs in board.governed.get(str(node.target), {}).values():
                board.fixed.update(unit for unit, _ in runs)
    return board


@final
@dataclass(frozen=True, slots=True)
class _Layers:
    """The leaf modules of a network; `calls` says how often each is called."""

    board: Board
    model: nn.Module
    calls: Counter[int]

    def call(self, node: fx.Node) -> Layout:
        """The layout that leaves a module."""
        m, x = self.model.get_submodule(str(node.target)), self.board.sole(node)
        if x is None or getattr(m, "return_indices", False):
            return self.board.unknown(node)
        # Exact types: a subclass may do something else.
        kind = type(m)
        out: Layout | None = None
        if isinstance(m, CONVS) and kind in CONVS:
            out = self._conv(node, m, x)
        elif isinstance(m, nn.Linear) and kind is nn.Linear:
            out = self._linear(node, m, x)
        elif isinstance(m, NORMS) and kind in NORMS:
            out = self._norm(node, m, x)
        elif isinstance(m, nn.Flatten) and kind is nn.Flatten:
            out = flatten(self.board, node, x, m.start_dim, m.end_dim)
        return out or simple(self.board, node, x, kind, bool(getattr(m, "inplace", False)))

    def _plain(self, node: fx.Node, m: nn.Module) -> bool:
        """Called once, with parameters and buffers that are nobody else's and lie under their own names."""
        local = [*m._parameters.items(), *m._buffers.items()]
        wanted = [n for n, t in local if t is not None and n not in m._non_persistent_buffers_set]
        if isinstance(m, (*CONVS, nn.Linear)):
            wanted.append("weight")
        return self.calls[id(m)] == 1 and all(f"{node.target}.{n}" in self.board.names for n in wanted)

    def _conv(self, node: fx.Node, m: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Layout) -> Layout:
        rank = len(m.kernel_size) + 2
        if x.rank not in (None, rank):
            return self.board.unknown(node)
        plain = self._plain(node, m)
        fits = plain and bool(x.units) and x.rank == rank and (x.axis, x.block) == (1, 1)
        fits = fits and self.board.width(x) == m.in_channels
        depthwise = 1 < m.groups == m.in_channels == m.out_channels
        if depthwise and fits:
            out = replace(x, zero=True)
        else:
            out = self.board.new(m.out_channels, rank, 1, x.batch, fixed=not plain or m.groups > 1)
            if fits and x.zero and m.groups == 1:
                self.board.govern(f"{node.target}.weight", 1, x)
            else:
                self.board.fixed.update(x.units)
        self.board.govern(f"{node.target}.weight", 0, out)
        self.board.govern(f"{node.target}.bias", 0, out)
        return out

    def _linear(self, node: fx.Node, m: nn.Linear, x: Layout) -> Layout:
        plain, width = self._plain(node, m), self.board.width(x)
        last = -1 if x.rank is None else x.rank - 1
        block = self.board.block(x, m.in_features)
        if plain and width and x.axis == last and x.zero and block:
            self.board.govern(f"{node.target}.weight", 1, x, block)
        else:
            self.board.fixed.update(x.units)
        out = self.board.new(m.out_features, x.rank, last, x.batch, fixed=not plain)
        self.board.govern(f"{node.target}.weight", 0, out)
        self.board.govern(f"{node.target}.bias", 0, out)
        return out

    def _norm(self, node: fx.Node, m: Norm, x: Layout) -> Layout:
        if not x.units:
            return x
        block = self.board.block(x, m.num_features)
        if not (self._plain(node, m) and x.rank in _RANKS[type(m)] and x.axis == 1 and block):
            return self.board.unknown(node)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.board.govern(f"{node.target}.{name}", 0, x, block)
        return replace(x, block=block, zero=m.affine or (x.zero and m.running_mean is None))
