"""The one random generator: keyed, counter based, the same on every machine.

Word ``i`` of a stream is a pure function of ``(key, i)``, so a mask can be drawn in any order, in
chunks, on a CPU or a GPU, or drawn again by the server, and come out bit for bit the same. It is
built for calibration and speed, not for cryptography: whoever sees enough words can find the key.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmask_flwr import jit

from . import hashed

CHUNK = 1 << 16  # words; 256 KB of int32 and its scratch stay in a core's L2
_COUNTERS = 1 << 32
_ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))

Words = TypeVar("Words", NDArray[np.int32], Tensor)


class Key(NamedTuple):
    """Two signed 32-bit words that name a stream; make one with `derive`.

    Never count `k0` upwards by hand: streams that share `k1` are permutations of each other.
    """

    k0: int
    k1: int


def encode(*parts: int | str | bytes) -> bytes:
    """Encode parts so that different sequences of parts never share an encoding.

    Each part is a type letter, its length in bytes (8 bytes, little-endian) and its bytes; integers
    are little-endian two's complement in the fewest bytes that hold them.

    Raises
    ------
    TypeError
        A part is neither int, str nor bytes.
    """
    out = bytearray()
    for part in parts:
        match part:
            case int():
                tag, body = b"i", part.to_bytes((part.bit_length() + 8) // 8, "little", signed=True)
            case str():
                tag, body = b"s", part.encode()
            case bytes():
                tag, body = b"b", part
            case _:
                raise TypeError(f"a key part is int, str or bytes, not {type(part).__name__}")
        out += tag + len(body).to_bytes(8, "little") + body
    return bytes(out)


def derive(*parts: int | str | bytes) -> Key:
    """Key of the stream named by `parts`, e.g. ``derive(seed, "train", round, client)``.

    The 64 key bits are BLAKE2b of `encode(*parts)`: equal parts give equal keys, any difference
    (also ``1`` against ``"1"``) gives an unrelated one.
    """
    digest = blake2b(encode(*parts), digest_size=8).digest()
    return Key(int.from_bytes(digest[:4], "little", signed=True), int.from_bytes(digest[4:], "little", signed=True))


def mix_(x: Words, t: Words) -> None:
    """One round of a 32-bit finaliser, in place, with `t` as scratch.

    Shifts and odd multipliers are the published low-bias triple (Wellons, hash-prospector); products wrap.
    """
    if isinstance(x, np.ndarray):
        u, v = x.view(np.uint32), t.view(np.uint32)
        for bits, factor in _ROUNDS:
            np.right_shift(u, bits, out=v)
            u ^= v
            if factor != 1:
                u *= factor
        return
    for bits, factor in _ROUNDS:
        torch.bitwise_right_shift(x, bits, out=t)
        t &= (1 << (32 - bits)) - 1  # the logical shift that int32 tensors lack
        x ^= t
        if factor != 1:
            x *= _signed(factor)


def hash_(x: Words, t: Words, key: Key | tuple[int, Words]) -> None:
    """Turn counters into words, in place; for numpy arrays and for torch tensors, the same words.

    The second word of ``key`` may be an int32 array: one a counter. ``t`` is scratch.
    """
    x ^= key[0]
    mix_(x, t)
    x ^= key[1]
    mix_(x, t)


def _signed(i: int) -> int:
    return i - _COUNTERS if i >= _COUNTERS // 2 else i


def check_range(n: int, start: int) -> None:
    """Raise ValueError unless counters ``start .. start+n-1`` exist."""
    if n < 0 or start < 0:
        raise ValueError(f"n and start must not be negative, got n={n}, start={start}")
    if start + n > _COUNTERS:
        raise ValueError(f"a key has 2**32 words, asked for words {start}..{start + n - 1}: derive another key")


class Scratch:
    """Two chunks of int32 that one call reuses: numpy would allocate them for every expression."""

    __slots__ = ("_base", "_t", "_x")

    def __init__(self, n: int) -> None:
        self._base = np.arange(min(n, CHUNK), dtype=np.int32)
        self._x = np.empty_like(self._base)
        self._t = np.empty_like(self._base)

    def words(self, key: Key, n: int, start: int) -> NDArray[np.int32]:
        """Words ``start .. start+n-1``, ``n <= CHUNK``; valid until the next call."""
        x = self._x[:n]
        np.add(self._base[:n], np.int32(_signed(start)), out=x)
        hash_(x, self._t[:n], key)
        return x


def words(key: Key, n: int, start: int = 0) -> NDArray[np.int32]:
    """Words ``start .. start+n-1`` of the stream `key`: (n,) int32, uniform on all 32-bit values.

    Raises
    ------
    ValueError
        `n` or `start` is negative, or the range passes counter 2**32.
    """
    check_range(n, start)
    out = np.empty(n, np.int32)
    scratch = Scratch(n)
    for a in range(0, n, CHUNK):
        b = min(a + CHUNK, n)
        out[a:b] = scratch.words(key, b - a, start + a)
    return out


def words_torch(key: Key, n: int, device: torch.device | str, start: int = 0) -> Tensor:
    """`words` as an int32 tensor computed on `device`; the same bits.

    Raises
    ------
    ValueError
        As `words`.
    """
    check_range(n, start)
    x = torch.arange(start, start + n, dtype=torch.int64, device=device).to(torch.int32)
    hash_(x, torch.empty_like(x), key)
    return x


def thresholds(theta: NDArray[np.floating[Any]]) -> NDArray[np.int32]:
    """Int32 cuts t with P(word < t) = theta to within 2**-32; theta in [0, 1], same shape.

    ``t = clip(floor(theta * 2**32), 0, 2**32 - 1) - 2**31``: theta = 0 never fires, theta = 1 fails
    with probability 2**-32.

    Raises
    ------
    ValueError
        theta holds a NaN.
    """
    theta = np.asarray(theta)
    flat, out = theta.reshape(-1), np.empty(theta.size, np.int32)
    for a in range(0, theta.size, CHUNK):
        cut = np.multiply(flat[a : a + CHUNK], 2.0**32, dtype=np.float64)
        np.floor(cut, out=cut)
        if np.isnan(cut).any():
            raise ValueError("theta holds NaN: a probability must lie in [0, 1]")
        np.clip(cut, 0, 2.0**32 - 1, out=cut)
        cut -= 2.0**31
        out[a : a + CHUNK] = cut
    return out.reshape(theta.shape)


def bernoulli(key: Key, thresholds: NDArray[np.int32], start: int = 0) -> NDArray[np.bool_]:
    """Bit i is ``words(key)[start + i] < thresholds[i]``: (d,) bool.

    Equal keys and equal thresholds give equal bits on every machine.

    Raises
    ------
    ValueError
        `thresholds` is not 1-D, or the range passes counter 2**32.
    """
    if thresholds.ndim != 1:
        raise ValueError(f"thresholds must be one flat vector, got shape {thresholds.shape}")
    n = len(thresholds)
    check_range(n, start)
    if jit.pays(n):
        return hashed.bits(thresholds, key, start)
    out = np.empty(n, np.bool_)
    scratch = Scratch(n)
    for a in range(0, n, CHUNK):
        b = min(a + CHUNK, n)
        np.less(scratch.words(key, b - a, start + a), thresholds[a:b], out=out[a:b])
    return out


def permutation(key: Key, n: int) -> NDArray[np.int64]:
    """Keyed shuffle of ``0 .. n-1``: the stable order of the first n words, (n,) int64."""
    return np.argsort(words(key, n), kind="stable").astype(np.int64, copy=False)
