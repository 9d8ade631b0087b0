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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_GROUPS = 64  # at most: a rANS group takes 0.8 MB of tables while it is decoded
_CHUNK = 1 << 16  # positions whose 64-bit places are in memory at a time
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
        delta, classes = unpack_bits(known.delta(bits), known.numel), known.checked_classes()
        tally = _tally(delta, classes)
        groups = _join(*_occurring(tally))
        dense, sparse, row = _layout(groups, tally)
        order = _Order(row[classes], dense + sparse)
        sorted_, cut = pack_bits(order.sort(delta)), sum(dense)
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
        tally = _tally(np.zeros(known.numel, np.bool_), classes)
        groups, at = _read_groups(body, int(np.count_nonzero(tally[0])))
        dense, sparse, row = _layout(groups, tally)
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
        delta = _Order(row[classes], dense + sparse).restore(flags)
        return known.delta(pack_bits(delta))

    def size(self, ones: tuple[int, ...], known: SideInfo) -> float:
        """Unknown from the layers' ones alone: see `measure`."""
        return math.inf

    def measure(self, delta: Bits, known: SideInfo) -> float:
        """Body bytes expected for a delta, without coding it."""
        sizes, ones = _occurring(_tally(unpack_bits(delta, known.numel), known.checked_classes()))
        groups = _join(sizes, ones)
        at = np.cumsum([0, *(joined for joined, _ in groups)])
        found = [_cost(sum(sizes[a:b]), sum(ones[a:b]))[0] for a, b in pairwise(at)]
        return 4 + math.fsum(found) / 8

    def max_body(self, numel: int, layers: int) -> int:
        """Both of its parts at their largest."""
        return _RANS.max_body(numel, _CLASSES) + _GAPS.max_body(numel, _CLASSES) + 2 * _CLASSES


def _tally(delta: NDArray[np.bool_], classes: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Positions and ones of each class: (2, 256)."""
    found = np.zeros((2, _CLASSES), np.int64)
    for a in range(0, classes.size, _CHUNK):
        part = classes[a : a + _CHUNK]
        found[0] += np.bincount(part, minlength=_CLASSES)
        found[1] += np.bincount(part[delta[a : a + _CHUNK]], minlength=_CLASSES)
    return found


def _occurring(tally: NDArray[np.int64]) -> tuple[list[int], list[int]]:
    """Positions and ones of each class that occurs."""
    sizes, ones = tally[:, tally[0] > 0].tolist()
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
    groups: Sequence[_Group], tally: NDArray[np.int64]
) -> tuple[tuple[int, ...], tuple[int, ...], NDArray[np.uint8]]:
    """Sizes of the dense groups and of the others, and the place of each class among them: (256,)."""
    occurring = np.flatnonzero(tally[0])
    edges = np.cumsum([0, *(joined for joined, _ in groups)]).tolist()
    dense = [i for i, (_, by_rans) in enumerate(groups) if by_rans]
    sparse = [i for i, (_, by_rans) in enumerate(groups) if not by_rans]
    row, sizes = np.zeros(_CLASSES, np.uint8), []
    for place, i in enumerate(dense + sparse):
        members = occurring[edges[i] : edges[i + 1]]
        row[members] = place
        sizes.append(int(tally[0, members].sum()))
    return tuple(sizes[: len(dense)]), tuple(sizes[len(dense) :]), row


@final
@dataclass(frozen=True, slots=True)
class _Order:
    """Positions sorted by group, in place within it, a chunk at a time; ``row`` is each position's group."""

    row: NDArray[np.uint8]
    sizes: tuple[int, ...]

    def sort(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Bring flags by position into the order of the groups."""
        out = np.empty_like(flags)
        for chunk, order, pieces in self._chunks():
            part, at = flags[chunk][order], 0
            for piece in pieces:
                n = piece.stop - piece.start
                out[piece] = part[at : at + n]
                at += n
        return out

    def restore(self, flags: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The inverse of `sort`."""
        out = np.empty_like(flags)
        for chunk, order, pieces in self._chunks():
            out[chunk][order] = np.concatenate([flags[piece] for piece in pieces])
        return out

    def _chunks(self) -> Iterator[tuple[slice, NDArray[np.intp], list[slice]]]:
        """A chunk of positions, its order by group, and the piece of each group that it is."""
        done = np.cumsum([0, *self.sizes])[:-1]
        for a in range(0, self.row.size, _CHUNK):
            part = self.row[a : a + _CHUNK]
            upto = done + np.bincount(part, minlength=done.size)
            pieces = [slice(*ends) for ends in zip(done.tolist(), upto.tolist(), strict=True)]
            yield slice(a, a + part.size), np.argsort(part, kind="stable"), pieces
            done = upto


def _read_groups(body: Body, occurring: int) -> tuple[list[_Group], int]:
    count, at = get_varint(body, 0, min(occurring, _GROUPS))
    if count > len(body) - at:
        raise WireError("context body is truncated within its groups")
    groups = [((byte >> 1) + 1, bool(byte & 1)) for byte in body[at : at + count]]
    if sum(joined for joined, _ in groups) != occurring:
        raise WireError(f"the groups of a context body do not add up to the {occurring} classes that occur")
    return groups, at + count
