"""What functions, methods and modules without parameters do to channels; see `Board.unknown` for all others."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from operator import getitem

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from .layout import UNKNOWN, Board, Layout

# Elementwise, with f(0) = 0 (so a pruned channel stays 0), or the identity in evaluation.
_KEEP_ZERO: frozenset[object] = frozenset(
    (
        *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU),
        *(nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Hardswish, nn.Tanh),
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.mish),
        *(F.elu, F.celu, F.selu, F.leaky_relu, F.hardswish, F.tanh),
        *(torch.relu, torch.relu_, torch.tanh, torch.clone, torch.abs, torch.square),
        *("relu", "relu_", "tanh", "clone", "contiguous", "detach", "float", "double", "half", "bfloat16"),
    )
)
# Elementwise, with f(0) != 0.
_MAKE_NONZERO: frozenset[object] = frozenset(
    [nn.Sigmoid, nn.Hardsigmoid, F.sigmoid, F.hardsigmoid, torch.sigmoid, "sigmoid"]
)
# Within each channel, with the rank they need: with one dimension less they would pool over channels.
_POOLS: dict[object, int] = {
    **dict.fromkeys([nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d], 3),
    **dict.fromkeys([F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d], 3),
    **dict.fromkeys([nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d], 4),
    **dict.fromkeys([F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d], 4),
    **dict.fromkeys([nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d], 5),
    **dict.fromkeys([F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d], 5),
}

_ADDS = (
    operator.add,
    operator.iadd,
    operator.sub,
    operator.isub,
    torch.add,
    torch.sub,
    "add",
    "add_",
    "sub",
    "sub_",
)
_MULS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_DIVS = (operator.truediv, operator.itruediv, torch.div, "div", "div_")
_CATS = (torch.cat, torch.concat, torch.concatenate)
_REDUCTIONS = (torch.mean, torch.sum, torch.amax, "mean", "sum", "amax")
_FLATTENS = (torch.flatten, "flatten")
_VIEWS = (torch.reshape, "view", "reshape")
_METADATA = (getattr, "size", "dim")


def call(board: Board, node: fx.Node) -> Layout:
    """The layout that leaves a function or method."""
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(board, node)
    x = board.sole(node)
    inplace = bool(node.kwargs.get("inplace", False))
    return board.unknown(node) if x is None else simple(board, node, x, node.target, inplace)


def simple(board: Board, node: fx.Node, x: Layout, key: object, inplace: bool) -> Layout:
    """The layout that leaves a function, method or parameterless module that is known by `key` alone."""
    if key in _KEEP_ZERO:
        return x
    if key in _MAKE_NONZERO and not inplace:
        return replace(x, zero=False)
    if key in _POOLS and (not x.units or (x.rank, x.axis) == (_POOLS[key], 1)):
        return x
    return board.unknown(node)


def _flatten_call(board: Board, node: fx.Node) -> Layout:
    x, (start, end) = board.sole(node), _options(node, start_dim=0, end_dim=-1)
    if x is None or not (isinstance(start, int) and isinstance(end, int)):
        return board.unknown(node)
    return flatten(board, node, x, start, end)


def flatten(board: Board, node: fx.Node, x: Layout, start: int, end: int) -> Layout:
    """The layout that leaves a flatten of dimensions start..end."""
    if not x.units and (start, end) == (1, -1):
        return replace(x, rank=2)
    if not x.units or x.rank is None or x.axis != 1:
        return board.unknown(node)
    start, end = start % x.rank, end % x.rank
    if end == x.rank - 1 and start > 1:
        return replace(x, rank=start + 1)
    if end == x.rank - 1 and start == 1:
        return x if x.rank == 2 else replace(x, rank=2, block=None if x.block == 1 else x.block)
    return board.unknown(node)


def _view(board: Board, node: fx.Node) -> Layout:
    size = node.args[1] if len(node.args) == 2 else node.args[1:]
    if node.kwargs or not isinstance(node.args[0], fx.Node) or not isinstance(size, tuple | list):
        return board.unknown(node)
    x, dims = board.values[node.args[0]], size
    if len(dims) == 2 and dims[1] == -1 and isinstance(dims[0], fx.Node) and _is_batch(board, dims[0]):
        return flatten(board, node, x, 1, -1)
    # Any other size holds the full network's channel numbers, or mixes examples.
    board.unknown(node)
    return Layout(rank=len(dims))


def _is_batch(board: Board, node: fx.Node) -> bool:
    """Whether `node` is the number of examples: ``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]``."""
    if node.target == "size" and node.args[1:] == (0,):
        return board.values[node.all_input_nodes[0]].batch
    if node.target is not getitem or node.args[1] != 0:
        return False
    source = node.all_input_nodes[0]
    whole = source.target is getattr and source.args[1:] == ("shape",)
    whole = whole or (source.target == "size" and len(source.args) == 1 and not source.kwargs)
    return whole and board.values[source.all_input_nodes[0]].batch


def _metadata(board: Board, node: fx.Node) -> Layout:
    """``x.shape``, ``x.size(...)``: harmless as long as nobody reads the number of channels."""
    x = board.sole(node)
    if x is None:
        return board.unknown(node)
    harmless = node.target == "dim" or (node.target is getattr and node.args[1] in ("dtype", "device", "ndim"))
    read = [] if harmless else [*node.args[1:], *node.kwargs.values()]
    if not harmless and read in ([], ["shape"]):
        users = [user for user in node.users if user.target is not getitem or user.users]
        read = [user.args[1] if user.target is getitem else None for user in users]
    if not all(_is_harmless(index, x) for index in read):
        return board.unknown(node)
    return UNKNOWN


def _is_harmless(index: object, x: Layout) -> bool:
    if not x.units or (index == 0 and x.rank is not None):
        return True
    return isinstance(index, int) and x.rank is not None and index % x.rank != x.axis


def _mean(board: Board, node: fx.Node) -> Layout:
    x, (dim, keep) = board.sole(node), _options(node, dim=None, keepdim=False)
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    if x is None or x.rank is None or x.axis != 1 or not all(isinstance(d, int) for d in dims):
        return board.unknown(node)
    gone = {d % x.rank for d in dims if isinstance(d, int)}
    if not gone or min(gone) < 2 or not isinstance(keep, bool):
        return board.unknown(node)
    return x if keep else replace(x, rank=x.rank - len(gone))


def _cat(board: Board, node: fx.Node) -> Layout:
    parts, dim = node.args[0] if node.args else None, _options(node, dim=0)[0]
    if not isinstance(parts, tuple | list) or not isinstance(dim, int) or not {"dim"}.issuperset(node.kwargs):
        return board.unknown(node)
    layouts = [board.values[part] if isinstance(part, fx.Node) else UNKNOWN for part in parts]
    x = layouts[0]
    axis = dim if x.rank is None else dim % x.rank
    same = {(one.rank, one.axis, one.block) for one in layouts} == {(x.rank, axis, x.block)}
    if not same or x.block is None or not all(one.units for one in layouts):
        return board.unknown(node)
    return replace(
        x,
        units=tuple(unit for one in layouts for unit in one.units),
        zero=all(one.zero for one in layouts),
        batch=all(one.batch for one in layouts),
    )


def _add(board: Board, node: fx.Node) -> Layout:
    x = board.sole(node)
    if x is not None and not x.units:
        return x
    out = board.unite(node)
    # `x += y` is traced as `x + y`: what still reads the old x then sees the sum, so both must be 0.
    return board.unknown(node) if out is None or not out.zero else out


def _mul(board: Board, node: fx.Node) -> Layout:
    inputs = node.all_input_nodes
    if len(inputs) == 1 and all(arg is inputs[0] or isinstance(arg, int | float) for arg in node.args):
        return board.values[inputs[0]]
    zero = any(board.values[n].zero for n in node.all_input_nodes)
    out = board.unite(node)
    return board.unknown(node) if out is None else replace(out, zero=zero)


def _div(board: Board, node: fx.Node) -> Layout:
    by = node.args[1] if len(node.args) == 2 else None
    return _mul(board, node) if isinstance(by, int | float) else board.unknown(node)


def _options(node: fx.Node, **defaults: object) -> list[object]:
    """Values of the arguments behind the first, in order, by position or name."""
    given = list(node.args[1 : 1 + len(defaults)])
    rest = list(defaults.items())[len(given) :]
    return [*given, *(node.kwargs.get(name, default) for name, default in rest)]


_RULES: dict[object, Callable[[Board, fx.Node], Layout]] = {
    **dict.fromkeys(_ADDS, _add),
    **dict.fromkeys(_MULS, _mul),
    **dict.fromkeys(_DIVS, _div),
    **dict.fromkeys(_CATS, _cat),
    **dict.fromkeys(_REDUCTIONS, _mean),
    **dict.fromkeys(_FLATTENS, _flatten_call),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_METADATA, _metadata),
}
