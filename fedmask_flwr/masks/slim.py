"""Prune filters: zero them at full size, cut them out of the network, or score them.

`slim_` makes what Gez & Cohen (arXiv 2312.03889) leave to the reader: a network that is smaller in memory and in
time, computes what the masked network computes in evaluation, and exports without custom operators.
"""

from __future__ import annotations

from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .coupling import Coupling, Entry
from .spec import MaskSpec
from .tracing import CONVS, NORMS, bare

Bits = NDArray[np.bool_] | Tensor
S = TypeVar("S", bound=np.generic)


@torch.no_grad()
def slim_(model: nn.Module, coupling: Coupling, spec: MaskSpec, keep: Bits) -> nn.Module:
    """Cut the pruned channels out of `model`, in place.

    Parameters and buffers are replaced by new, smaller ones (make optimisers afterwards); parameters keep
    ``requires_grad``. What is left is a plain module with the layers, names and hooks it had.

    Parameters
    ----------
    model
        The full network that `coupling` was made from; a compiled one must be compiled again.
    spec
        From ``coupling.spec()``.
    keep
        (d,) bool, True for channels that stay.

    Returns
    -------
    `model`.

    Raises
    ------
    ValueError
        A unit would lose its last channel, or model, coupling, spec and `keep` do not fit together.
    """
    kept = _Kept(coupling, spec, keep)
    inner = bare(model)
    for entry, tensor in _tensors(inner, coupling):
        cuts = kept.along(entry)
        if not cuts:
            continue
        part = tensor.detach()
        for dim, index in cuts:
            part = part.index_select(dim, torch.from_numpy(np.flatnonzero(index)).to(tensor.device))
        path, _, name = entry.name.rpartition(".")
        module = inner.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, nn.Parameter(part, tensor.requires_grad))
        else:
            module._buffers[name] = part
        _resize(module)
    return model


def _resize(module: nn.Module) -> None:
    """Make a layer's attributes agree with its tensors."""
    if isinstance(module, CONVS):
        rows, columns = module.weight.shape[:2]
        if module.groups > 1:  # of these only depthwise convolutions are ever cut
            module.groups = rows
        module.out_channels, module.in_channels = rows, columns * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        rows = next(t for t in (module.weight, module.running_mean) if t is not None).shape[0]
        module.num_features = rows


@torch.no_grad()
def mask_filters(model: nn.Module, coupling: Coupling, spec: MaskSpec, keep: Bits) -> None:
    """Zero the pruned channels in place, at full size: the function that `slim_` keeps.

    Weights, biases, and BatchNorm weights and biases of pruned channels become 0, so that those channels are
    exactly 0 behind BatchNorm. An optimiser does not know of it: mask again after each of its steps.

    Raises
    ------
    ValueError
        See `slim_`.
    """
    kept = _Kept(coupling, spec, keep)
    for entry, tensor in _tensors(bare(model), coupling):
        rows = dict(kept.along(entry)).get(0)
        if rows is not None and isinstance(tensor, nn.Parameter):
            tensor[torch.from_numpy(~rows).to(tensor.device)] = 0


def slim_numel(coupling: Coupling, spec: MaskSpec, keep: Bits) -> int:
    """Count the floating values in the state dict of the slim network.

    Raises
    ------
    ValueError
        See `slim_`.
    """
    kept = _Kept(coupling, spec, keep)
    return sum(prod(kept.shape(entry)) for entry in coupling.entries)


def gather(full: NDArray[S], coupling: Coupling, spec: MaskSpec, keep: Bits) -> NDArray[S]:
    """Pick the slim network's floats out of the full network's.

    Parameters
    ----------
    full
        (coupling.numel,): the floating tensors of the state dict sorted by name, each row-major.

    Returns
    -------
    (slim_numel,), in the same order, of the same dtype.

    Raises
    ------
    ValueError
        `full` has another size; see also `slim_`.
    """
    kept = _Kept(coupling, spec, keep)
    parts, at = [], 0
    _check_flat(full, coupling.numel, "full")
    for entry in _flat_order(coupling):
        part = full[at : at + entry.numel].reshape(entry.shape)
        for dim, index in kept.along(entry):
            part = part.compress(index, axis=dim)
        parts.append(part.reshape(-1))
        at += entry.numel
    return np.concatenate(parts)


def scatter(slim: NDArray[S], coupling: Coupling, spec: MaskSpec, keep: Bits) -> NDArray[S]:
    """Put the slim network's floats back in their places in the full network's.

    Parameters
    ----------
    slim
        (slim_numel,), from `gather` or a slim network.

    Returns
    -------
    (coupling.numel,), of the same dtype; 0 where pruned, and 1 for the running variance of a pruned channel.

    Raises
    ------
    ValueError
        `slim` has another size; see also `slim_`.
    """
    kept = _Kept(coupling, spec, keep)
    _check_flat(slim, slim_numel(coupling, spec, keep), "slim")
    out = np.empty(coupling.numel, slim.dtype)
    at = start = 0
    for entry in _flat_order(coupling):
        shape, cuts = kept.shape(entry), kept.along(entry)
        part = slim[at : at + prod(shape)].reshape(shape)
        place = out[start : start + entry.numel].reshape(entry.shape)
        if cuts:
            place[...] = entry.fill
            index = dict(cuts)
            place[np.ix_(*(index.get(dim, np.ones(n, bool)) for dim, n in enumerate(entry.shape)))] = part
        else:
            place[...] = part
        at, start = at + part.size, start + entry.numel
    return out


@torch.no_grad()
def filter_scores(model: nn.Module, coupling: Coupling, spec: MaskSpec) -> NDArray[np.float64]:
    """L2 norm of each channel's weights.

    Returns
    -------
    (d,): the square root of the sum of squares over the channel's rows in all weights of its unit.

    Raises
    ------
    ValueError
        Model, coupling and spec do not fit together.
    """
    _units(coupling, spec)
    squares = [np.zeros(size) for size in spec.sizes]
    for unit, p in zip(spec.units, spec.params(bare(model)), strict=True):
        norms = torch.linalg.vector_norm(p.detach().flatten(1), dim=1, dtype=torch.float64)
        squares[unit] += norms.cpu().numpy() ** 2
    return np.sqrt(np.concatenate(squares))


class _Kept:
    """Which channels of each unit stay; a unit outside the mask keeps all."""

    def __init__(self, coupling: Coupling, spec: MaskSpec, keep: Bits) -> None:
        units = _units(coupling, spec)
        bits = keep.detach().cpu().numpy() if isinstance(keep, Tensor) else np.asarray(keep)
        if bits.dtype != np.bool_ or bits.shape != (spec.numel,):
            raise ValueError(f"keep must be {spec.numel} bools, one per channel, got {bits.dtype} {bits.shape}")
        parts = np.split(bits, np.cumsum(spec.sizes)[:-1])
        for i, part in enumerate(parts):
            if not part.any():
                name = spec.names[spec.units.index(i)]
                raise ValueError(f"keep drops every channel of {name!r} (unit {i}): keep at least one of each unit")
        self._units = {u: part for u, part in zip(units, parts, strict=True) if not part.all()}
        self._channels = coupling.channels

    def along(self, entry: Entry) -> list[tuple[int, NDArray[np.bool_]]]:
        """(dimension, what stays along it), for the dimensions that lose something."""
        cuts = []
        for dim, segments in entry.dims:
            if any(s.unit in self._units for s in segments):
                index = np.ones(entry.shape[dim], bool)
                for s in segments:
                    if s.unit in self._units:
                        rows = np.repeat(self._units[s.unit], s.block)
                        index[s.offset : s.offset + rows.size] = rows
                cuts.append((dim, index))
        return cuts

    def shape(self, entry: Entry) -> tuple[int, ...]:
        """Shape in the slim network."""
        cuts = {dim: int(index.sum()) for dim, index in self.along(entry)}
        return tuple(cuts.get(dim, n) for dim, n in enumerate(entry.shape))


def _units(coupling: Coupling, spec: MaskSpec) -> list[int]:
    """The coupling's number of each unit of the mask."""
    shapes = {e.name: (e.shape, e.unit) for e in coupling.entries}
    found: dict[int, int] = {}
    for name, shape, unit in zip(spec.names, spec.shapes, spec.units, strict=False):
        at = shapes.get(name, ((), None))
        if (
            at[1] is None
            or at[0] != shape
            or not coupling.prunable[at[1]]
            or found.setdefault(unit, at[1]) != at[1]
        ):
            raise ValueError(f"the mask's {name!r} is not in the coupling: make it with coupling.spec()")
    members = {name for name, (_, unit) in shapes.items() if unit in found.values()}
    if members != set(spec.names) or len(set(found.values())) != len(found):
        raise ValueError("the mask's units are not those of the coupling: make it with coupling.spec()")
    return [found[i] for i in range(len(found))]


def _tensors(model: nn.Module, coupling: Coupling) -> list[tuple[Entry, Tensor]]:
    state = model.state_dict(keep_vars=True)
    for e in coupling.entries:
        shape = tuple(state[e.name].shape) if e.name in state else None
        if shape != e.shape:
            raise ValueError(
                f"the coupling is for {e.name!r} of shape {e.shape}, the model has {shape or 'none'}: give the "
                "full network that the coupling was made from"
            )
    return [(e, state[e.name]) for e in coupling.entries]


def _flat_order(coupling: Coupling) -> list[Entry]:
    return sorted(coupling.entries, key=lambda entry: entry.name)


def _check_flat(values: NDArray[Any], numel: int, what: str) -> None:
    if values.shape != (numel,):
        raise ValueError(f"{what} must be a vector of {numel} values, got shape {values.shape}")
