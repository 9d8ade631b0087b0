"""Where the values of a decomposed network live, one packed vector of what can matter, and how they compose."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor, nn

from .spec import named_parameters


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The packed order of a network's weights: kind by kind, row-major inside each, structural zeros left out.

    A kind is one weight tensor of 2 or more dimensions. Its column o is index o of its first dimension, an output
    unit. The same model and structural masks give the same order everywhere, so no position is ever sent.

    Attributes
    ----------
    names, shapes
        The kinds in the order of ``named_parameters``, named as if never compiled, and their shapes.
    where
        For each kind its flat positions that can matter: ascending, (nnz,) int64.
    column
        The global column of each packed value: (n,) int64, never decreasing. Column o of kind k is o plus the
        ``shape[0]`` of all earlier kinds.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    where: tuple[Tensor, ...]
    column: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, structural: Mapping[str, Tensor] | None = None, local: Collection[str] = ()
    ) -> Structure:
        """Find the kinds of `model`: its floating parameters with 2 or more dimensions, tied ones once.

        Parameters
        ----------
        structural
            By kind a bool tensor of its shape, true where a weight can ever matter. Kinds without one matter
            everywhere.
        local
            Names of parameters that are no kinds, such as the weight of a head that stays on its client.

        Raises
        ------
        ValueError
            There is no kind, or a name, a shape or a type in `structural` or `local` does not fit the model.
        """
        parameters = dict(named_parameters(model))
        if strangers := sorted(set(local) - set(parameters)):
            raise ValueError(f"the model has no parameter {strangers[0]!r} to keep local, only {list(parameters)}")
        kinds = {
            name: p
            for name, p in parameters.items()
            if p.ndim >= 2 and p.numel() and p.is_floating_point() and name not in local
        }
        structural = {} if structural is None else structural
        if not kinds:
            raise ValueError("no weight of 2 or more dimensions is left: nothing to decompose")
        if strangers := sorted(set(structural) - set(kinds)):
            raise ValueError(f"there is no kind {strangers[0]!r} for a structural mask, only {list(kinds)}")
        where, column, first = [], [], 0
        for name, p in kinds.items():
            where.append(_positions(name, p, structural.get(name)))
            column.append(where[-1] // prod(p.shape[1:]) + first)
            first += p.shape[0]
        return cls(tuple(kinds), tuple(tuple(p.shape) for p in kinds.values()), tuple(where), torch.cat(column))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Packed values of each kind (nnz)."""
        return tuple(len(where) for where in self.where)

    @property
    def numel(self) -> int:
        """Number of packed values n."""
        return len(self.column)

    @property
    def column_sizes(self) -> tuple[int, ...]:
        """Columns of each kind: the length of its first dimension."""
        return tuple(shape[0] for shape in self.shapes)

    @property
    def columns(self) -> int:
        """Number of columns of all kinds together."""
        return sum(self.column_sizes)

    @property
    def dense_numel(self) -> int:
        """Number of weights of all kinds, structural zeros included."""
        return sum(prod(shape) for shape in self.shapes)

    def kind_slices(self) -> list[slice]:
        """Where each kind lies in a packed vector."""
        ends = list(accumulate(self.sizes, initial=0))
        return [slice(a, b) for a, b in pairwise(ends)]

    def lengths(self) -> Tensor:
        """Packed values of each column: (columns,) int64, 0 for a column without any."""
        return torch.bincount(self.column, minlength=self.columns)

    def params(self, model: nn.Module) -> list[nn.Parameter]:
        """Find the kinds of `model`, in order.

        Raises
        ------
        ValueError
            `model` lacks one of them, or has it with another shape.
        """
        have, found = dict(named_parameters(model)), []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in have:
                raise ValueError(f"the model has no parameter {name!r}: it is not the model of this structure")
            if tuple(have[name].shape) != shape:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(have[name].shape)}, the structure is for {shape}: "
                    "build the model with the options the structure was made with"
                )
            found.append(have[name])
        return found

    @torch.no_grad()
    def gather(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Pack one tensor for each kind, weights or gradients: (n,) float32, in `out` if that is given.

        None counts as zeros, as the gradient of a parameter that took no part is.

        Raises
        ------
        ValueError
            There is not one tensor for each kind, or one has another shape than its kind.
        """
        self._check(tensors)
        if out is None:
            device = next((t.device for t in tensors if t is not None), self.column.device)
            out = torch.empty(self.numel, device=device)
        for t, where, part in zip(tensors, self.where, self.kind_slices(), strict=True):
            if t is None:
                out[part].zero_()
                continue
            flat = (t if t.layout == torch.strided else t.to_dense()).detach().reshape(-1)
            if len(where) == len(flat):
                out[part].copy_(flat)
            else:
                torch.index_select(flat.to(out), 0, where.to(out.device), out=out[part])
        return out

    @torch.no_grad()
    def scatter_(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Unpack `values` (n,) in place into one tensor for each kind; structural zeros are left as they are.

        Raises
        ------
        ValueError
            There is not one tensor of the right shape for each kind, or not one value for each position.
        """
        self._check(tensors)
        if values.shape != (self.numel,):
            raise ValueError(f"expected {self.numel} packed values, got shape {tuple(values.shape)}")
        for t, where, part in zip(tensors, self.where, self.kind_slices(), strict=True):
            if len(where) == t.numel():
                t.copy_(values[part].view(t.shape))
                continue
            flat = t.detach().reshape(-1)
            flat.scatter_(0, where.to(t.device), values[part].to(t))
            if not t.is_contiguous():
                # Then `flat` is a copy, not a view.
                t.copy_(flat.view(t.shape))

    def write(self, model: nn.Module, values: Tensor) -> None:
        """Write packed values (n,) into the model in place; weights at structural zeros are left alone.

        Raises
        ------
        ValueError
            The model or the number of values does not fit.
        """
        self.scatter_(self.params(model), values)

    def _check(self, tensors: Sequence[Tensor | None]) -> None:
        if len(tensors) != len(self.shapes):
            raise ValueError(f"expected one tensor for each of {len(self.shapes)} kinds, got {len(tensors)}")
        for name, shape, t in zip(self.names, self.shapes, tensors, strict=True):
            if t is not None and tuple(t.shape) != shape:
                raise ValueError(f"the tensor for {name!r} has shape {tuple(t.shape)}, expected {shape}")


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The parts of a decomposed network; float32, n packed values, N entries of knowledge, t earlier tasks.

    Attributes
    ----------
    base, adaptive
        B and A of the present task: (n,).
    mask
        m before the sigmoid, one for each column: (columns,).
    alpha
        Attention, one for each entry and kind: (N, kinds).
    knowledge
        The entries KB, constants: (N, n).
    old_adaptive, old_masks
        A_i (t, n) and m_i (t, columns) of the earlier tasks.
    snap_base, snap_adaptive
        B (n,) and A_i (t, n) as they were when the present task began.
    """

    base: Tensor
    adaptive: Tensor
    mask: Tensor
    alpha: Tensor
    knowledge: Tensor
    old_adaptive: Tensor
    old_masks: Tensor
    snap_base: Tensor
    snap_adaptive: Tensor

    def check(self, structure: Structure) -> None:
        """Check all shapes.

        Raises
        ------
        ValueError
            A part does not fit the structure or another part.
        """
        n, columns, entries, tasks = structure.numel, structure.columns, len(self.knowledge), len(self.old_adaptive)
        expected = {
            **dict.fromkeys(("base", "adaptive", "snap_base"), (n,)),
            "mask": (columns,),
            "alpha": (entries, len(structure.names)),
            "knowledge": (entries, n),
            **dict.fromkeys(("old_adaptive", "snap_adaptive"), (tasks, n)),
            "old_masks": (tasks, columns),
        }
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")


@torch.no_grad()
def compose(
    structure: Structure, base: Tensor, mask: Tensor, adaptive: Tensor, alpha: Tensor, knowledge: Tensor
) -> Tensor:
    """theta = B*sigma(m) + A + sum_n alpha_n*KB_n: (n,) packed weights; shapes as in `Parts`."""
    gate = torch.sigmoid(mask)[structure.column.to(mask.device)]
    return compose_(structure, base, gate, adaptive, alpha, knowledge, torch.empty_like(base))


def compose_(
    structure: Structure, base: Tensor, gate: Tensor, adaptive: Tensor, alpha: Tensor, kb: Tensor, out: Tensor
) -> Tensor:
    """`compose` into `out`, with the mask as a gate sigmoid(m) for each packed value: (n,)."""
    torch.mul(base, gate, out=out).add_(adaptive)
    if len(kb):
        for kind, part in enumerate(structure.kind_slices()):
            out[part].addmv_(kb[:, part].t(), alpha[:, kind])
    return out


def _positions(name: str, p: Tensor, mask: Tensor | None) -> Tensor:
    """Flat positions of one kind that can matter, ascending, on the device of the parameter."""
    if mask is None:
        return torch.arange(p.numel(), device=p.device)
    if mask.dtype != torch.bool or mask.shape != p.shape:
        raise ValueError(
            f"the structural mask of {name!r} must be bool with shape {tuple(p.shape)}, "
            f"got {mask.dtype} with shape {tuple(mask.shape)}"
        )
    return mask.reshape(-1).nonzero().squeeze(1).to(p.device)
