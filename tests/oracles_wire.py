"""Slow, readable twins of the wire codecs: one bit, one symbol, one key at a time."""

from __future__ import annotations

import math
import struct


def entropy_bits(ones: int, size: int) -> float:
    """size * H(ones / size), in bits."""
    if ones in (0, size):
        return 0.0
    p = ones / size
    return -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def varint(n: int) -> bytes:
    out = []
    while n >= 128:
        out.append(n % 128 + 128)
        n //= 128
    return bytes([*out, n])


def pack(flags: list[int]) -> bytes:
    out = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        out[i // 8] |= flag << (i % 8)
    return bytes(out)


def rice_encode(delta: list[int], sizes: tuple[int, ...], params: list[int]) -> bytes:
    """The rice body for given parameter bytes (k, +64 for thirds), from its description."""
    head, coded = b"", []
    start = 0
    for size, param in zip(sizes, params, strict=True):
        layer = delta[start : start + size]
        start += size
        flip = 2 * sum(layer) > size
        gaps, run = [], 0
        for bit in layer:
            if bit != flip:
                gaps.append(run)
                run = 0
            else:
                run += 1
        head += varint(len(gaps)) + bytes([param + 128 * flip])
        coded += [(g, param % 64, param >= 64) for g in gaps]
    planes = b""
    for b in range(max((k for _, k, _ in coded), default=0)):
        planes += pack([(g >> b) & 1 for g, k, _ in coded if k > b])
    thirds = [(g >> k) % 3 for g, k, three in coded if three]
    planes += pack([int(t > 0) for t in thirds]) + pack([int(t == 2) for t in thirds if t > 0])
    unary: list[int] = []
    for g, k, three in coded:
        unary += [0] * (g // ((3 if three else 1) << k)) + [1]
    return head + planes + pack(unary)


def rans_encode(symbols: list[int], contexts: list[int], tables: list[list[int]], lanes: int) -> bytes:
    """Scalar rANS: every lane a Python integer, the words of a step in lane order."""
    states = [1 << 16] * lanes
    words: list[int] = []
    for first in range((len(symbols) - 1) // lanes * lanes, -1, -lanes):
        step = []
        for lane, i in enumerate(range(first, min(first + lanes, len(symbols)))):
            freqs = tables[contexts[i]]
            f, cum = freqs[symbols[i]], sum(freqs[: symbols[i]])
            x = states[lane]
            if x >= f << 16:
                step.append(x & 0xFFFF)
                x >>= 16
            states[lane] = (x // f << 16) + x % f + cum
        words = step + words
    return varint(lanes) + struct.pack(f"<{lanes}I", *states) + struct.pack(f"<{len(words)}H", *words)


def byte_table(p: int) -> list[int]:
    """Frequencies of the bytes of a layer whose ones have probability p / 65536."""
    freqs = [max(1, p ** (k := b.bit_count()) * (65536 - p) ** (8 - k) >> 112) for b in range(256)]
    freqs[0 if p <= 32768 else 255] += 65536 - sum(freqs)
    return freqs


def entropy_encode(layers: list[list[int]], ps: list[int], lanes: int) -> bytes:
    """The entropy body for given levels, from its description."""
    symbols: list[int] = []
    contexts: list[int] = []
    for layer, p in zip(layers, ps, strict=True):
        if p not in (0, 65535):
            symbols += pack(layer)
            contexts += [p] * -(-len(layer) // 8)
    head = struct.pack(f"<{len(ps)}H", *ps)
    rows = sorted(set(contexts))
    if not rows:
        return head
    return head + rans_encode(symbols, [rows.index(p) for p in contexts], [byte_table(p) for p in rows], lanes)


def context_groups(body: bytes) -> list[tuple[int, bool]]:
    """Classes joined in each group of a context body of under 128 groups, and whether it is by rANS."""
    return [(b // 2 + 1, bool(b % 2)) for b in body[1 : 1 + body[0]]]


def context_encode(
    delta: list[int],
    classes: list[int],
    groups: list[tuple[int, bool]],
    ps: list[int],
    lanes: int,
    params: list[int],
) -> bytes:
    """The context body for given groups and the parameters of what they are coded with."""
    occurring = sorted(set(classes))
    dense, sparse = [], []
    for joined, by_rans in groups:
        members, occurring = occurring[:joined], occurring[joined:]
        (dense if by_rans else sparse).append([f for f, c in zip(delta, classes, strict=True) if c in members])
    assert not occurring
    out = varint(len(groups)) + bytes(2 * (joined - 1) + by_rans for joined, by_rans in groups)
    if dense:
        body = entropy_encode(dense, ps, lanes)
        out += varint(len(body)) + body
    if sparse:
        out += rice_encode([f for layer in sparse for f in layer], tuple(map(len, sparse)), params)
    return out


def murmur64(h: int) -> int:
    mask = 2**64 - 1
    h ^= h >> 33
    h = h * 0xFF51AFD7ED558CCD & mask
    h ^= h >> 33
    h = h * 0xC4CEB9FE1A85EC53 & mask
    return h ^ h >> 33


def fuse_contains(body: bytes, width: int, key: int) -> bool:
    """One key against a filter body (3-wise binary fuse, arXiv 2201.01174)."""
    seed, _, length, _, span, array = struct.unpack_from("<QIIIII", body)
    slots = struct.unpack_from(f"<{array}{'BH'[width - 1]}", body, 28)
    h = murmur64((key + seed) % 2**64)
    a = h * span >> 64
    b = (a + length) ^ (h >> 18) & (length - 1)
    c = (a + 2 * length) ^ h & (length - 1)
    return (h ^ h >> 32) % 256**width == slots[a] ^ slots[b] ^ slots[c]
