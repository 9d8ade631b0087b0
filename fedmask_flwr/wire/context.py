"""Codec ``context``: flips coded by how likely both ends already hold each of them.

``SideInfo.classes`` sorts the positions into classes of like odds. The encoder joins neighbouring classes into
groups where a header would cost more than it saves, and codes each group, its positions in order, as if it were a
layer: dense groups by static rANS, sparse ones by their gaps.
Body: varint number of groups; a byte a group, (classes joined - 1) << 1 | (1 if by rANS); where there are such
groups, varint length of their ``entropy`` body, and that body; where there are others, their ``rice`` body. Classes
without a position do not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias, final

import numpy as np
from numpy.typing import NDArray

from .base import BitCodec, Body
from .bits import Bits, pack_bits, slice_bits, unpack_bits
from .entropy import EntropyCodec
from .errors import WireError
from .rice import RiceCodec, best
from .sideinfo import SideInfo
from .varint import get_varint, put_varint

_CLASSES = 256
_JOINED = 128  # classes in one group at most: seven bits
_RANS, _GAPS = EntropyCodec(), RiceCodec()
_RANS_HEAD, _GAPS_HEAD = 24.0, 28.0  # bits that a group costs besides its flips
_DENSE = 0.02  # below this share of ones, gaps are as small as rANS of whole bytes

_Group: TypeAlias = tuple[int, bool]
"""Number of classes joined, and whether they are coded by rANS."""


@final
class ContextCodec(BitCodec):
    """Within 3 % of the sum over the classes of n*H(p) from 10^4 flips on."""

    id = 4
    name = "context"

    def encode(self, bits: Bits, known: SideInfo) -> bytes:
        """Choose the groups and code each; ValueError where both ends know no classes."""
        delta, classes = unpack_bits(known.delta(bits), known.numel), _classes(known)
        sizes, ones = _tally(delta, classes)
        groups = _join(sizes, ones)
        dense, sparse, order = _layout(groups, sizes, classes)
        permuted, cut = pack_bits(delta[order]), sum(dense)
        parts = [put_varint(len(groups)), bytes((joined - 1) << 1 | by_rans for joined, by_rans in groups)]
        if dense:
            body = _RANS.encode(slice_bits(permuted, 0, cut), SideInfo(dense))
            parts += [put_varint(len(body)), body]
        if sparse:
            parts.append(_GAPS.encode(slice_bits(permuted, cut, known.numel), SideInfo(sparse)))
        return b"".join(parts)

    def decode(self, body: Body, known: SideInfo) -> Bits:
        """Read it back; WireError if the groups do not fit the classes, or a part of the body is not valid."""
        if known.classes is None:
            raise WireError("a field came coded by classes of positions, which this end does not know for it")
        classes = _classes(known)
        sizes = _occurring(np.bincount(classes, minlength=_CLASSES))
        groups, at = _read_groups(body, len(sizes))
        dense, sparse, order = _layout(groups, sizes, classes)
        flags = np.empty(known.numel, np.bool_)
        cut = sum(dense)
        if dense:
            length, at = get_varint(body, at, len(body))
            if length > len(body) - at:
                raise WireError("context body is truncated within its dense groups")
            flags[:cut] = unpack_bits(_RANS.decode(body[at : at + length], SideInfo(dense)), cut)
            at += length
        if sparse:
            flags[cut:] = unpack_bits(_GAPS.decode(body[at:], SideInfo(sparse)), known.numel - cut)
        elif at != len(body):
            raise WireError("context body is longer than its groups")
        delta = np.empty_like(flags)
        delta[order] = flags
        return known.delta(pack_bits(delta))

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Unknown from the layers' ones alone: see `measure`."""
        return math.inf

    def measure(self, delta: Bits, known: SideInfo) -> float:
        """Body bytes expected for a delta, without coding it; inf where both ends know no classes."""
        if known.classes is None:
            return math.inf
        sizes, ones = _tally(unpack_bits(delta, known.numel), _classes(known))
        groups = _join(sizes, ones)
        at = np.cumsum([0, *(joined for joined, _ in groups)])
        found = [_cost(sum(sizes[a:b]), sum(ones[a:b]))[0] for a, b in pairwise(at)]
        return 4 + math.fsum(found) / 8

    def max_body(self, numel: int, layers: int) -> int:
        """Both of its parts at their largest."""
        return _RANS.max_body(numel, _CLASSES) + _GAPS.max_body(numel, _CLASSES) + 2 * _CLASSES


def _classes(known: SideInfo) -> NDArray[np.uint8]:
    if known.classes is None:
        raise ValueError("codec context needs what both ends know of each position: use auto, which does without")
    classes = known.classes()
    if classes.dtype != np.uint8 or classes.shape != (known.numel,):
        raise ValueError(f"classes are ({known.numel},) uint8, got {classes.shape} {classes.dtype}")
    return classes


def _occurring(tally: NDArray[np.int64]) -> list[int]:
    found: list[int] = tally[tally > 0].tolist()
    return found


def _tally(delta: NDArray[np.bool_], classes: NDArray[np.uint8]) -> tuple[list[int], list[int]]:
    """Positions and ones of each class that occurs."""
    sizes = np.bincount(classes, minlength=_CLASSES)
    ones = np.bincount(classes[delta], minlength=_CLASSES)[sizes > 0]
    return _occurring(sizes), ones.tolist()


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
    """Join the two neighbours that save most, until none do."""
    rows = [(1, size, n, *_cost(size, n)) for size, n in zip(sizes, ones, strict=True)]

    def joined(i: int) -> tuple[float, tuple[int, int, int, float, bool]]:
        (a, size, n, cost, _), (b, more, m, other, _) = rows[i], rows[i + 1]
        both = _cost(size + more, n + m)
        return (cost + other - both[0] if a + b <= _JOINED else -math.inf), (a + b, size + more, n + m, *both)

    savings = [joined(i) for i in range(len(rows) - 1)]
    while savings:
        at = max(range(len(savings)), key=lambda i: savings[i][0])
        if savings[at][0] < 0:
            break
        rows[at : at + 2] = [savings[at][1]]
        del savings[at]
        for i in (at - 1, at):
            if 0 <= i < len(savings):
                savings[i] = joined(i)
    return [(count, dense) for count, *_, dense in rows]


def _layout(
    groups: Sequence[_Group], sizes: Sequence[int], classes: NDArray[np.uint8]
) -> tuple[tuple[int, ...], tuple[int, ...], NDArray[np.intp]]:
    """Sizes of the dense groups and of the others, and the order that brings all positions into theirs."""
    at, of = 0, []
    for joined, by_rans in groups:
        of.append((not by_rans, at, at + joined))
        at += joined
    ranked = sorted(of)  # dense groups first
    row = np.zeros(at, np.uint16)
    for i, (_, first, last) in enumerate(ranked):
        row[first:last] = i
    every = np.zeros(_CLASSES, np.uint16)
    every[np.bincount(classes, minlength=_CLASSES) > 0] = row
    dense = tuple(sum(sizes[a:b]) for sparse, a, b in ranked if not sparse)
    rest = tuple(sum(sizes[a:b]) for sparse, a, b in ranked if sparse)
    return dense, rest, np.argsort(every[classes], kind="stable")


def _read_groups(body: Body, occurring: int) -> tuple[list[_Group], int]:
    count, at = get_varint(body, 0, occurring)
    if count > len(body) - at:
        raise WireError("context body is truncated within its groups")
    groups = [((byte >> 1) + 1, bool(byte & 1)) for byte in body[at : at + count]]
    if sum(joined for joined, _ in groups) != occurring:
        raise WireError(f"the groups of a context body do not add up to the {occurring} classes that occur")
    return groups, at + count
