"""Size of every bit codec against d*H(p), and its time, all in one run.

Run: python benchmarks/codecs.py [--numel 1000000] [--density 0.001 0.01 ...] [--codec rice entropy ...]
"""

from __future__ import annotations

import argparse
import json
import math
import time

import numpy as np

from fedmask_flwr.wire import Payload, SideInfo, codec_names, pack, pack_bits, popcount, unpack

DIGEST = bytes(8)


def entropy_bits(ones: int, size: int) -> float:
    """size * H(ones / size), in bits."""
    p = ones / size
    return 0.0 if ones in (0, size) else -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def measure(numel: int, density: float, name: str) -> dict[str, float | str]:
    """Whole frames: bits per parameter, ratio to the entropy, encode and decode ns per parameter (best of 3)."""
    known = SideInfo((numel,))
    bits = pack_bits(np.random.default_rng(0).random(numel) < density)
    payload = Payload(bits={"mask": bits})
    encode_s, decode_s = math.inf, math.inf
    for _ in range(3):
        start = time.perf_counter()
        data = pack(payload, digest=DIGEST, round_=0, known=known, codecs={"bits": name})
        encode_s = min(encode_s, time.perf_counter() - start)
        start = time.perf_counter()
        got = unpack(data, digest=DIGEST, round_=0, known=known, expect={"mask": numel})
        decode_s = min(decode_s, time.perf_counter() - start)
    entropy = entropy_bits(popcount(bits), numel)
    return {
        "numel": numel,
        "density": density,
        "codec": name,
        "chosen": got.codecs["mask"].name,
        "bpp": 8 * len(data) / numel,
        "entropy_bpp": entropy / numel,
        "over_entropy": 8 * len(data) / entropy if entropy else math.nan,
        "wrong_bits": popcount(got.payload.bits["mask"] ^ bits),
        "encode_ns": 1e9 * encode_s / numel,
        "decode_ns": 1e9 * decode_s / numel,
    }


def main() -> None:
    """Print a table and, as the last line, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--density", type=float, nargs="+", default=[0.001, 0.01, 0.05, 0.2, 0.5])
    parser.add_argument("--codec", nargs="+", default=codec_names("bits"), choices=codec_names("bits"))
    args = parser.parse_args()
    rows = [measure(args.numel, p, name) for p in args.density for name in args.codec]
    print(f"{'p':>6} {'codec':13} {'bpp':>8} {'H(p)':>8} {'/ H':>6} {'wrong bits':>10} {'enc ns':>8} {'dec ns':>8}")
    for r in rows:
        print(
            f"{r['density']:6} {r['codec']:13} {r['bpp']:8.4f} {r['entropy_bpp']:8.4f} {r['over_entropy']:6.3f} "
            f"{r['wrong_bits']:10} {r['encode_ns']:8.2f} {r['decode_ns']:8.2f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
