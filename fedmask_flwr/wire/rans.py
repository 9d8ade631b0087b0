"""Multi-lane static rANS in plain numpy: the same bytes on every machine.

J. Duda 2013 (arXiv 1311.2540): 32-bit states, 16-bit renormalisation, frequencies that sum to 2^16.
Symbol i belongs to lane i % lanes; all lanes take one step together, so a step is a few array operations.
Stream: varint lanes, one u32 state a lane, then the u16 words in the order in which the decoder reads them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmask_flwr import jit
from fedmask_flwr.jit import compiled

from .base import Body
from .errors import WireError
from .varint import get_varint, put_varint

TOTAL = 1 << 16
"""Sum of every frequency table."""
_MAX_LANES = 4096
_MAX_STEPS = 1 << 14  # bounds the time of a decode: a step costs microseconds however few lanes there are
_LANE_BYTES = 600  # payload a lane, so that its 4-byte state stays near 0.5 %
_BITS, _STEP = 8, 1024  # positions that a symbol, and a step of all lanes, count for where machine code may pay
_BLOCK = 1 << 20  # symbols whose 64-bit places are in memory at a time

Tables = NDArray[np.uint32]
"""Shape (contexts, symbols): frequencies of each context, every row sums to TOTAL."""


def lane_count(n: int, size: float) -> int:
    """Lanes for `n` symbols that take about `size` bytes."""
    return max(1, min(_MAX_LANES, n, max(int(size) // _LANE_BYTES, _fewest_lanes(n))))


def _fewest_lanes(n: int) -> int:
    return min(_MAX_LANES, -(-n // _MAX_STEPS))


def _by_machine(n: int, lanes: int) -> bool:
    return jit.pays(_BITS * n + _STEP * -(-n // lanes))


def _check_tables(tables: Tables) -> None:
    if tables.shape[1] > TOTAL or not (tables.sum(axis=1, dtype=np.uint64) == TOTAL).all():
        raise ValueError(f"each frequency table must sum to {TOTAL}")


def encode(
    symbols: NDArray[np.unsignedinteger], contexts: NDArray[np.unsignedinteger] | None, tables: Tables
) -> bytes:
    """Code `symbols` of shape (n,), each by the row of `tables` that `contexts` of shape (n,) names.

    `contexts` None means row 0 throughout. A symbol of frequency 0 is a ValueError.
    """
    _check_tables(tables)
    n, index = symbols.size, symbols.astype(np.uint32)
    if contexts is not None:
        for start in range(0, n, _BLOCK):
            index[start : start + _BLOCK] += contexts[start : start + _BLOCK] * np.uint32(tables.shape[1])
    freqs = tables.reshape(-1)
    used = np.zeros(freqs.size, np.int64)
    for start in range(0, n, _BLOCK):
        used += np.bincount(index[start : start + _BLOCK], minlength=freqs.size)
    live = used > 0
    if not freqs[live].all():
        raise ValueError("a symbol to be coded has frequency 0")
    size = float((used[live] * (16 - np.log2(freqs[live]))).sum()) / 8
    lanes = lane_count(n, round(size, 3))  # rounded: the last place of log2 differs between machines
    cums = (np.cumsum(tables, axis=1, dtype=np.uint32) - tables).reshape(-1)
    state = np.full(lanes, TOTAL, np.uint32)
    if _by_machine(n, lanes):
        back = np.empty(n, np.uint16)
        stream = back[_encode(index, freqs, cums, state, back) :]
        return put_varint(lanes) + state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()
    words: list[NDArray[np.uint16]] = []
    for row in range((n - 1) // lanes * lanes, -1, -lanes):
        at = index[row : row + lanes]
        freq, cum = freqs[at], cums[at]
        x = state[: freq.size]
        full = np.flatnonzero((x >> 16) >= freq)
        if full.size:
            spill = x[full]
            words.append(spill.astype(np.uint16))  # the low half
            x[full] = spill >> 16
        # (x // f << 16) + x % f + cum, modulo 2^32
        x += (x // freq) * (TOTAL - freq) + cum
    stream = np.concatenate(words[::-1]) if words else np.empty(0, np.uint16)
    return put_varint(lanes) + state.astype("<u4").tobytes() + stream.astype("<u2").tobytes()


def decode(
    body: Body, at: int, n: int, contexts: NDArray[np.unsignedinteger] | None, tables: Tables
) -> NDArray[np.uint16]:
    """Read n symbols from `body`, offset `at` to its end; shape (n,).

    Raises
    ------
    WireError
        Wrong lane count, truncated or left-over words, or lanes that do not end in the initial state.
    """
    lanes, at = get_varint(body, at, _MAX_LANES)
    if not max(1, _fewest_lanes(n)) <= lanes <= max(1, n):
        raise WireError(f"{lanes} rANS lanes do not fit {n} symbols")
    left = len(body) - at - 4 * lanes
    if left < 0 or left & 1:
        raise WireError("rANS body is truncated")
    state = np.frombuffer(body, "<u4", lanes, at).astype(np.uint32)
    words = np.frombuffer(body, "<u2", left // 2, at + 4 * lanes)
    if (state < TOTAL).any():
        raise WireError("a rANS state is out of range")
    _check_tables(tables)
    step_of, symbol_of = _slot_tables(tables)
    slots = np.empty(n, np.uint16)
    if _by_machine(n, lanes):
        which = np.empty(0, np.uint16) if contexts is None else contexts.astype(np.uint16, copy=False)
        read = _decode(state, words.astype(np.uint16), step_of, symbol_of, which, slots)
        return _ended(slots, state, words.size - read)
    read = 0
    for row in range(0, n, lanes):
        slot = slots[row : row + lanes]
        x = state[: slot.size]
        slot[:] = x & 0xFFFF
        if contexts is None:
            step = step_of[slot]
        else:
            step = step_of[slot + (contexts[row : row + lanes].astype(np.intp) << 16)]
        x >>= 16
        x *= (step >> 16) + 1
        x += step & 0xFFFF
        low = np.flatnonzero(x < TOTAL)
        if low.size:
            more = words[read : read + low.size]
            if more.size < low.size:
                raise WireError("rANS body is truncated")
            x[low] = (x[low] << 16) | more
            read += low.size
    for start in range(0, n, _BLOCK):
        slot = slots[start : start + _BLOCK]
        of = 0 if contexts is None else contexts[start : start + _BLOCK].astype(np.intp) << 16
        slot[:] = symbol_of[slot + of]
    return _ended(slots, state, words.size - read)


def _ended(symbols: NDArray[np.uint16], state: NDArray[np.uint32], left: int) -> NDArray[np.uint16]:
    """Give the symbols if the stream ends with them: lanes in their initial state, no words left or missing."""
    if left < 0:
        raise WireError("rANS body is truncated")
    if left or (state != TOTAL).any():
        raise WireError("rANS body does not end where its symbols end")
    return symbols


def _slot_tables(tables: Tables) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """By slot of each context: (frequency - 1) << 16 | place within the symbol, and the symbol."""
    steps, symbols = [], []
    ramp = np.arange(TOTAL, dtype=np.uint32)
    for freqs in tables:
        symbols.append(np.repeat(np.arange(freqs.size, dtype=np.uint16), freqs))
        cum = np.cumsum(freqs, dtype=np.uint32) - freqs
        steps.append((np.repeat(freqs - 1, freqs) << 16) | (ramp - np.repeat(cum, freqs)))
    return np.concatenate(steps), np.concatenate(symbols)


@compiled()
def _encode(
    index: NDArray[np.uint32],
    freqs: NDArray[np.uint32],
    cums: NDArray[np.uint32],
    state: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> int:
    """Fill ``words`` from its end, in the order of `encode`; the place of the first."""
    at, lane = words.size, (index.size - 1) % state.size
    for i in range(index.size - 1, -1, -1):
        symbol = index[i]
        freq, x = np.int64(freqs[symbol]), np.int64(state[lane])
        if x >> 16 >= freq:
            at -= 1
            words[at] = x & 0xFFFF
            x >>= 16
        # a quotient of doubles, cut off, is exact for 32-bit numbers, and quicker than an integer division
        state[lane] = x + np.int64(np.float64(x) / np.float64(freq)) * (TOTAL - freq) + cums[symbol]
        lane = lane - 1 if lane else state.size - 1
    return at


@compiled()
def _decode(
    state: NDArray[np.uint32],
    words: NDArray[np.uint16],
    step_of: NDArray[np.uint32],
    symbol_of: NDArray[np.uint16],
    contexts: NDArray[np.uint16],
    symbols: NDArray[np.uint16],
) -> int:
    """Fill ``symbols``; the words read, or one more than there are. One table where there are no contexts."""
    read = lane = 0
    for i in range(symbols.size):
        x = np.int64(state[lane])
        slot = x & 0xFFFF
        if contexts.size:
            slot += np.int64(contexts[i]) << 16
        step = np.int64(step_of[slot])
        symbols[i] = symbol_of[slot]
        x = (x >> 16) * ((step >> 16) + 1) + (step & 0xFFFF)
        if x < TOTAL:
            if read == words.size:
                return read + 1
            x = x << 16 | np.int64(words[read])
            read += 1
        state[lane] = x
        lane = lane + 1 if lane + 1 < state.size else 0
    return read
