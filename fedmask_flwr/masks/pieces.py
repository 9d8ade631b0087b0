"""Slices of a flat vector against the layers of a network: what a step works on, as much as a cache holds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import isfinite, nan, prod
from typing import final

import torch
from torch import Tensor, nn

from .spec import MaskSpec

LARGEST = torch.finfo(torch.float32).max


@final
class Frozen:
    """The frozen weights w, layer by layer. Those of a seed, -c or +c in a layer, take a byte each on a CPU.

    Parameters
    ----------
    flat
        w, (spec.weights,) float32; held, not copied, where it is no such weights.
    """

    def __init__(self, spec: MaskSpec, flat: Tensor) -> None:
        self.device = flat.device
        self._layers = list(spec.split_weights(flat).values())
        self.scales: list[float] | None = None
        """c of each layer, whose weights are c times what is held."""
        if flat.device.type == "cpu" and spec.granularity == "weight":
            scales = [float(w.abs().max()) if w.numel() else 0.0 for w in self._layers]
            if all(
                0.0 < c < LARGEST and bool((w.abs() == c).all()) for c, w in zip(scales, self._layers, strict=True)
            ):
                self._layers = [w.sign().to(torch.int8) for w in self._layers]
                self.scales = scales

    def __len__(self) -> int:
        return len(self._layers)

    def held(self, layer: int) -> Tensor:
        """What is held of a layer, flat: w itself as float32, or its signs as int8."""
        return self._layers[layer].view(-1)

    def part(self, layer: int, here: slice = slice(None)) -> Tensor:
        """W of a layer, or some of it, flat float32; not for writing."""
        held = self.held(layer)[here]
        return held if self.scales is None else held.to(torch.float32).mul_(self.scales[layer])

    def whole(self, layer: int) -> Tensor:
        """W of a layer in its own shape, float32; not for writing."""
        return self.part(layer).view(self._layers[layer].shape)

    def flat(self) -> Tensor:
        """W, (spec.weights,) float32; a copy."""
        return torch.cat([self.part(layer) for layer in range(len(self))])

    def peaks(self) -> list[float]:
        """Largest magnitude of w of each layer."""
        return self.scales or [float(w.abs().max()) for w in self._layers]


@final
class Layers:
    """The masked parameters, their frozen weights and where each lies in the mask.

    Parameters
    ----------
    params
        In mask order.
    frozen
        w, (spec.weights,); see `Frozen`.
    """

    def __init__(self, spec: MaskSpec, params: Sequence[nn.Parameter], frozen: Tensor) -> None:
        self._spec, self.whole = spec, spec.granularity == "filter"
        self.on_cpu = frozen.device.type == "cpu"
        self.params, self.frozen = list(params), Frozen(spec, frozen)
        self._peaks: list[float] | None = None
        self._starts = [0, *accumulate(prod(shape) for shape in spec.shapes)]

    def room(self, n: int) -> int:
        """Number of values that the work vector of the two methods below needs for slices of ``n``."""
        return self._spec.numel if self.whole else n

    def gradients(self) -> list[Tensor | None]:
        """dL/d(w*m) of each layer, None where there is none."""
        found = [p.grad for p in self.params]
        return [g if g is None or g.layout == torch.strided else g.to_dense() for g in found]

    def incoming(self, grads: Sequence[Tensor | None], part: slice, work: Tensor) -> Tensor:
        """Slice of dL/dm = G*w, summed over a filter's weights; valid until ``work`` is used again."""
        if self.whole:
            for layer, (grad, g) in enumerate(zip(grads, self._spec.split(work).values(), strict=True)):
                if grad is None:
                    g.zero_()
                else:
                    w = self.frozen.whole(layer)
                    g.copy_((grad * w).sum(tuple(range(1, w.ndim)), keepdim=True))
            return work[part]
        for layer, here, there in self._pieces(part):
            grad, g = grads[layer], work[there]
            if grad is None:
                torch.mul(self.frozen.part(layer, here), 0.0, out=g)
            else:
                torch.mul(grad.reshape(-1)[here].float(), self.frozen.part(layer, here), out=g)
        return work[: part.stop - part.start]

    def starts(self) -> Iterator[tuple[int, int]]:
        """First position in the mask of each layer, and the one behind its last."""
        return pairwise(self._starts)

    def peaks(self) -> list[float]:
        """Largest magnitude of w of each layer; w is frozen, so they are looked for once."""
        if self._peaks is None:
            self._peaks = self.frozen.peaks()
        return self._peaks

    def bad(self, grads: Sequence[Tensor | None]) -> str | None:
        """Name of the first layer whose gradient holds NaN or infinity."""
        for layer, (name, grad) in enumerate(zip(self._spec.names, grads, strict=True)):
            if grad is not None and not bool(torch.isfinite(grad.float() * self.frozen.whole(layer)).all()):
                return name
        return None

    def write(self, parts: Iterator[tuple[slice, Tensor]]) -> None:
        """Set the parameters to w*m from slices of m in order; at filter granularity there is one slice."""
        if self.whole:
            for _, values in parts:
                for layer, (p, m) in enumerate(zip(self.params, self._spec.split(values).values(), strict=True)):
                    torch.mul(self.frozen.whole(layer), m, out=p)
            return
        # A parameter in another memory format has no flat view.
        plain = [p.is_contiguous() for p in self.params]
        flat = [
            p.view(-1) if own else torch.empty_like(p, memory_format=torch.contiguous_format).view(-1)
            for p, own in zip(self.params, plain, strict=True)
        ]
        for part, values in parts:
            for layer, here, there in self._pieces(part):
                torch.mul(self.frozen.part(layer, here), values[there], out=flat[layer][here])
        for p, own, values in zip(self.params, plain, flat, strict=True):
            if not own:
                p.copy_(values.view(p.shape))

    def restore(self) -> None:
        """Set the parameters to w."""
        for layer, p in enumerate(self.params):
            p.copy_(self.frozen.whole(layer))

    def _pieces(self, part: slice) -> Iterator[tuple[int, slice, slice]]:
        """Layers that a slice of the mask touches: number, which of their weights, where in the slice."""
        for layer in range(bisect_right(self._starts, part.start) - 1, len(self.params)):
            start, stop = self._starts[layer : layer + 2]
            if start >= part.stop:
                return
            a, b = max(start, part.start), min(stop, part.stop)
            yield layer, slice(a - start, b - start), slice(a - part.start, b - part.start)


def finite(layers: Layers, grads: Sequence[Tensor | None]) -> bool:
    """Whether every element of ``G*w`` is sure to be, from the largest of both: one pass over G alone."""
    ends = [(0.0, 0.0) if g is None else tuple(float(x) for x in g.float().aminmax()) for g in grads]
    tops = (max(-low, high) if isfinite(low + high) else nan for low, high in ends)
    return all(g * w <= LARGEST for g, w in zip(tops, layers.peaks(), strict=True))
