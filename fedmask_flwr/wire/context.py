"""Codec ``context``: flips coded by how likely both ends already hold each of them.

``SideInfo.classes`` sorts the positions into classes of like odds. The encoder joins neighbouring classes into
groups where a header would cost more than it saves, and codes each group, its positions in order, as if it were a
layer: dense groups by static rANS, sparse ones by their gaps.
Body: varint number of groups, at most 64; a byte a group, (classes joined - 1) << 1 | (1 if by rANS); where there
are such groups, varint length of their ``entropy`` body, and that body; where there are others, their ``rice``
body. Classes without a position do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, nbytes, paste_bits, slice_bits
from .entropy import EntropyCodec
from .errors import WireError
from .order import CLASSES, Order, tally
from .rice import RiceCodec, best
from .sideinfo import SideInfo
from .varint import get_varint, put_varint

_JOINED = 128  # classes in one group at most: seven bits
_GROUPS = 64  # at most: a rANS group takes 0.8 MB of tables while it is decoded
_RANS, _GAPS = EntropyCodec(), RiceCodec()
_RANS_HEAD, _GAPS_HEAD = 24.0, 28.0  # bits that a group costs besides its flips
_DENSE = 0.02  # below this share of ones, gaps are as small as rANS of whole bytes

_Group: TypeAlias = tuple[int, bool]
"""Number of classes joined, and whether they are coded by rANS."""


@final
class ContextCodec(BitCodec):
    """Within 3 % of the sum over the classes of n*H(p) from 10^4 flips on; without classes, all are one."""

    id = 6
    name = "context"

    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Choose the groups and code each."""
        delta, classes = known.delta(bits), known.checked_classes()
        found = tally(delta, classes)
        groups = _join(*_occurring(found))
        dense, sparse, row = _layout(groups, found)
        sorted_, cut = Order(classes, row, dense + sparse).sort(delta), sum(dense)
        parts = [put_varint(len(groups)), bytes((joined - 1) << 1 | by_rans for joined, by_rans in groups)]
        if dense:
            body = _RANS.encode(slice_bits(sorted_, 0, cut), SideInfo(dense))
            parts += [put_varint(len(body)), body]
        if sparse:
            parts.append(_GAPS.encode(slice_bits(sorted_, cut, known.numel), SideInfo(sparse)))
        return b"".join(parts)

    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Read it back; WireError if the groups do not fit the classes, or a part of the body is not valid."""
        classes = known.checked_classes()
        found = tally(None, classes)
        groups, at = _read_groups(body, int(np.count_nonzero(found[0])))
        dense, sparse, row = _layout(groups, found)
        sorted_ = np.zeros(nbytes(known.numel), np.uint8)
        cut = sum(dense)
        if dense:
            length, at = get_varint(body, at, len(body))
            if length > len(body) - at:
                raise WireError("context body is truncated within its dense groups")
            paste_bits(sorted_, 0, _RANS.decode(body[at : at + length], SideInfo(dense)))
            at += length
        if sparse:
            paste_bits(sorted_, cut, _GAPS.decode(body[at:], SideInfo(sparse)))
        elif at != len(body):
            raise WireError("context body is longer than its groups")
        return known.delta(Order(classes, row, dense + sparse).restore(sorted_))

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Unknown from the layers' ones alone: see `measure`."""
        return math.inf

    def measure(self, delta: Bits, known: SideInfo) -> float:
        """Body bytes expected for a delta, without coding it."""
        sizes, ones = _occurring(tally(delta, known.checked_classes()))
        groups = _join(sizes, ones)
        at = np.cumsum([0, *(joined for joined, _ in groups)])
        found = [_cost(sum(sizes[a:b]), sum(ones[a:b]))[0] for a, b in pairwise(at)]
        return 4 + math.fsum(found) / 8

    def max_body(self, numel: int, layers: int) -> int:
        """Both of its parts at their largest."""
        return _RANS.max_body(numel, CLASSES) + _GAPS.max_body(numel, CLASSES) + 2 * CLASSES


def _occurring(found: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Positions and ones of each class that occurs."""
    sizes, ones = found[:, found[0] > 0].tolist()
    return sizes, ones


def _cost(size: int, ones: int) -> tuple[float, bool]:
    """Bits of a group, and whether rANS is the cheaper way."""
    fewer = min(ones, size - ones)
    gaps = _GAPS_HEAD + best(fewer, size)[0]
    if fewer < _DENSE * size:
        return gaps, False
    p = fewer / size
    rans = _RANS_HEAD + 1.003 * size * -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    return min((gaps, False), (rans, True))


def _join(sizes: Sequence[int], ones: Sequence[int]) -> list[_Group]:
    """Join the two neighbours that save most, until none do and the groups are few enough."""
    rows = [(1, size, n, *_cost(size, n)) for size, n in zip(sizes, ones, strict=True)]

    def joined(i: int) -> tuple[float, tuple[int, int, int, float, bool]]:
        (a, size, n, cost, _), (b, more, m, other, _) = rows[i], rows[i + 1]
        both = _cost(size + more, n + m)
        return (cost + other - both[0] if a + b <= _JOINED else -math.inf), (a + b, size + more, n + m, *both)

    savings = [joined(i) for i in range(len(rows) - 1)]
    while savings:
        at = max(range(len(savings)), key=lambda i: savings[i][0])
        if savings[at][0] < 0 and len(rows) <= _GROUPS:
            break
        rows[at : at + 2] = [savings[at][1]]
        del savings[at]
        for i in (at - 1, at):
            if 0 <= i < len(savings):
                savings[i] = joined(i)
    return [(count, dense) for count, *_, dense in rows]


def _layout(
    groups: Sequence[_Group], found: NDArray[np.int64]
) -> tuple[tuple[int, ...], tuple[int, ...], NDArray[np.uint8]]:
    """Sizes of the dense groups and of the others, and the place of each class among them: (256,)."""
    occurring = np.flatnonzero(found[0])
    edges = np.cumsum([0, *(joined for joined, _ in groups)]).tolist()
    dense = [i for i, (_, by_rans) in enumerate(groups) if by_rans]
    sparse = [i for i, (_, by_rans) in enumerate(groups) if not by_rans]
    row, sizes = np.zeros(CLASSES, np.uint8), []
    for place, i in enumerate(dense + sparse):
        members = occurring[edges[i] : edges[i + 1]]
        row[members] = place
        sizes.append(int(found[0, members].sum()))
    return tuple(sizes[: len(dense)]), tuple(sizes[len(dense) :]), row


def _read_groups(body: Body, occurring: int) -> tuple[list[_Group], int]:
    count, at = get_varint(body, 0, min(occurring, _GROUPS))
    if count > len(body) - at:
        raise WireError("context body is truncated within its groups")
    groups = [((byte >> 1) + 1, bool(byte & 1)) for byte in body[at : at + count]]
    if sum(joined for joined, _ in groups) != occurring:
        raise WireError(f"the groups of a context body do not add up to the {occurring} classes that occur")
    return groups, at + count
