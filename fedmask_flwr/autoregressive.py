"""The masks of an autoregressive network: degrees drawn from a seed, and a linear layer under a stack of masks.

Integers only (`fedmask_flwr.masks.words`): equal seeds give equal masks on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .masks import derive, permutation, words

__all__ = ["Bits", "MaskedLinear", "below", "degrees", "digest_of", "masks_of"]

Ints = NDArray[np.int64]
Bits = NDArray[np.bool_]


def below(w: NDArray[np.int32], n: int) -> Ints:
    """Map 32-bit words to integers in [0, n) by multiply and shift; each one's probability is off by < 2**-32."""
    return (w.astype(np.int64) & 0xFFFFFFFF) * n >> 32


def degrees(inputs: int, hidden: Sequence[int], seed: int, order: int | None, connect: int) -> list[Ints]:
    """Degrees m_0 (D,), m_1 (H_1,), .. m_L (H_L,), section 4 of the paper.

    m_0 is each input's position 1..D in the factorisation: the identity if `order` is None, else the permutation
    keyed by (seed, "order", order). Hidden degrees of layer l are uniform on ``min(m_{l-1}) .. D-1``, keyed by
    (seed, "connect", connect, l); they do not depend on the order, since min(m_0) is always 1.
    """
    m0 = np.arange(inputs, dtype=np.int64) if order is None else permutation(derive(seed, "order", order), inputs)
    m = [m0 + 1]
    for layer, width in enumerate(hidden, 1):
        low = int(m[-1].min())
        m.append(low + below(words(derive(seed, "connect", connect, layer), width), inputs - low))
    return m


def masks_of(m: list[Ints]) -> list[Bits]:
    """Masks [out, in] of the hidden layers and the output, then of the direct weights."""
    hidden = [here[:, None] >= prev[None, :] for prev, here in pairwise(m)]
    return [*hidden, m[0][:, None] > m[-1][None, :], m[0][:, None] > m[0][None, :]]


@final
class MaskedLinear(nn.Linear):
    """A linear layer of weights [out, in] under mask `index` of a stack (R, out, in), which is no parameter.

    The stack has the weights' dtype: the product with bits costs 1.4 times as much on a CPU.
    """

    mask: Tensor

    def __init__(self, masks: Bits, bias: bool = True) -> None:
        super().__init__(masks.shape[2], masks.shape[1], bias)
        self.register_buffer("mask", torch.from_numpy(masks).to(self.weight.dtype), persistent=False)
        nn.init.xavier_uniform_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def masked(self, index: int, weight: Tensor | None = None) -> Tensor:
        """Own weights, or others of this layer's shape, times mask `index` modulo the number of masks."""
        return (self.weight if weight is None else weight) * self.mask[index % len(self.mask)]

    def forward(self, x: Tensor, index: int = 0, bias: Tensor | None = None) -> Tensor:
        """``(n, in) -> (n, out)``, with another bias than its own if one is given."""
        return functional.linear(x, self.masked(index), self.bias if bias is None else bias)


def digest_of(stacks: Sequence[Bits]) -> str:
    """32 hex digits of all shapes and bits."""
    digest = sha256()
    for stack in stacks:
        digest.update(np.array(stack.shape, "<i8").tobytes())
        digest.update(np.packbits(stack).tobytes())
    return digest.hexdigest()[:32]
