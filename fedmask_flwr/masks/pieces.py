"""Slices of a flat vector against the layers of a network: what a step works on, as much as a cache holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from .spec import MaskSpec


@final
class Layers:
    """The masked parameters, their frozen weights and where each lies in the mask.

    Parameters
    ----------
    params
        In mask order.
    frozen
        w, (spec.weights,); not copied.
    """

    def __init__(self, spec: MaskSpec, params: Sequence[nn.Parameter], frozen: Tensor) -> None:
        self._spec, self._whole = spec, spec.granularity == "filter"
        self._params, self._frozen = list(params), list(spec.split_weights(frozen).values())
        self._starts = [0, *accumulate(prod(shape) for shape in spec.shapes)]

    def room(self, n: int) -> int:
        """Number of values that the work vector of the two methods below needs for slices of ``n``."""
        return self._spec.numel if self._whole else n

    def gradients(self) -> list[Tensor | None]:
        """dL/d(w*m) of each layer, None where there is none."""
        found = [p.grad for p in self._params]
        return [g if g is None or g.layout == torch.strided else g.to_dense() for g in found]

    def incoming(self, grads: Sequence[Tensor | None], part: slice, work: Tensor) -> Tensor:
        """Slice of dL/dm = G*w, summed over a filter's weights; valid until ``work`` is used again."""
        if self._whole:
            for w, grad, g in zip(self._frozen, grads, self._spec.split(work).values(), strict=True):
                if grad is None:
                    g.zero_()
                else:
                    g.copy_((grad * w).sum(tuple(range(1, w.ndim)), keepdim=True))
            return work[part]
        for layer, here, there in self._pieces(part):
            grad, g = grads[layer], work[there]
            if grad is None:
                g.zero_()
            else:
                torch.mul(grad.reshape(-1)[here], self._frozen[layer].view(-1)[here], out=g)
        return work[: part.stop - part.start]

    def bad(self, grads: Sequence[Tensor | None]) -> str | None:
        """Name of the first layer whose gradient holds NaN or infinity."""
        for name, w, grad in zip(self._spec.names, self._frozen, grads, strict=True):
            if grad is not None and not bool(torch.isfinite(grad * w).all()):
                return name
        return None

    def write(self, parts: Iterator[tuple[slice, Tensor]]) -> None:
        """Set the parameters to w*m from slices of m in order; at filter granularity there is one slice."""
        if self._whole:
            for _, values in parts:
                for p, w, m in zip(self._params, self._frozen, self._spec.split(values).values(), strict=True):
                    torch.mul(w, m, out=p)
            return
        # A parameter in another memory format has no flat view.
        plain = [p.is_contiguous() for p in self._params]
        flat = [
            p.view(-1) if own else torch.empty_like(p, memory_format=torch.contiguous_format).view(-1)
            for p, own in zip(self._params, plain, strict=True)
        ]
        for part, values in parts:
            for layer, here, there in self._pieces(part):
                torch.mul(self._frozen[layer].view(-1)[here], values[there], out=flat[layer][here])
        for p, own, values in zip(self._params, plain, flat, strict=True):
            if not own:
                p.copy_(values.view(p.shape))

    def restore(self) -> None:
        """Set the parameters to w."""
        for p, w in zip(self._params, self._frozen, strict=True):
            p.copy_(w)

    def _pieces(self, part: slice) -> Iterator[tuple[int, slice, slice]]:
        """Layers that a slice of the mask touches: number, which of their weights, where in the slice."""
        for layer in range(bisect_right(self._starts, part.start) - 1, len(self._params)):
            start, stop = self._starts[layer : layer + 2]
            if start >= part.stop:
                return
            a, b = max(start, part.start), min(stop, part.stop)
            yield layer, slice(a - start, b - start), slice(a - part.start, b - part.start)
