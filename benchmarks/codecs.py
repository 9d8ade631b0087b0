"""Size of every bit codec against d*H(p), and its time, all in one run.

Run: python benchmarks/codecs.py [--numel 1000000] [--density 0.001 0.01 ...] [--codec rice entropy ...]
[--classes 32] [--out file.json]

With --classes, both ends know of each position which of so many classes it is in: the first are the commonest, and
flip most. Times are of this thread's processor time, the best of three; FEDMASK_JIT=0 times numpy alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.ratios import Ratio, save  # noqa: E402
from fedmask_flwr import jit  # noqa: E402
from fedmask_flwr.wire import (  # noqa: E402
    CODECS,
    Payload,
    SideInfo,
    codec_names,
    pack,
    pack_bits,
    popcount,
    unpack,
)

DIGEST = bytes(8)


def entropy_bits(ones: int, size: int) -> float:
    """size * H(ones / size), in bits."""
    p = ones / size
    return 0.0 if ones in (0, size) else -size * (p * math.log2(p) + (1 - p) * math.log2(1 - p))


def measure(numel: int, density: float, name: str, classes: int = 0) -> dict[str, float | str]:
    """Whole frames: bits per parameter, ratio to the entropy, encode and decode ns per parameter (best of 3)."""
    rng, known, odds = np.random.default_rng(0), SideInfo((numel,)), np.float32(density)
    if classes:
        where = np.minimum(rng.geometric(2 / classes, numel) - 1, classes - 1).astype(np.uint8)
        shares = np.exp(-4 / classes * np.arange(classes))
        shares *= density * numel / (np.bincount(where, minlength=classes) @ shares)
        known, odds = SideInfo((numel,), classes=lambda: where), shares.astype(np.float32)[where]
    bits = pack_bits(rng.random(numel, dtype=np.float32) < odds)
    payload = Payload(bits={"mask": bits})
    encode_s, decode_s = math.inf, math.inf
    for _ in range(3):
        start = time.thread_time()
        data = pack(payload, digest=DIGEST, round_=0, known=known, codecs={"bits": name})
        encode_s = min(encode_s, time.thread_time() - start)
        start = time.thread_time()
        got = unpack(data, digest=DIGEST, round_=0, known=known, expect={"mask": numel})
        decode_s = min(decode_s, time.thread_time() - start)
    entropy = entropy_bits(popcount(bits), numel)
    return {
        "numel": numel,
        "density": density,
        "codec": name,
        "classes": classes,
        "compiled": jit.available(),
        "chosen": got.codecs["mask"].name,
        "bpp": 8 * len(data) / numel,
        "entropy_bpp": entropy / numel,
        "over_entropy": 8 * len(data) / entropy if entropy else math.nan,
        "wrong_bits": popcount(got.payload.bits["mask"] ^ bits),
        "encode_ns": 1e9 * encode_s / numel,
        "decode_ns": 1e9 * decode_s / numel,
    }


def figures(rows: list[dict]) -> list[Ratio]:
    """How much longer ``auto`` is than the shortest exact codec, and its seconds."""
    out, over = [], []
    for row in (row for row in rows if row["codec"] == "auto"):
        same = [r for r in rows if r["density"] == row["density"] and r["codec"] in CODECS]
        if exact := [r["bpp"] for r in same if CODECS[r["codec"]].lossless]:
            over.append(row["bpp"] / min(exact))
        seconds = {way: row[f"{way}_ns"] * row["numel"] / 1e9 for way in ("encode", "decode")}
        of = f"auto, {row['density']:.0%} of {row['numel']:.1e} bits"
        limit = 0.5 if (row["numel"], row["density"]) == (86_000_000, 0.01) else None
        out += [Ratio(f"{of}: seconds to {way}", s, limit, "at most") for way, s in seconds.items()]
    return [Ratio("auto / the shortest exact codec, bytes", max(over), 1.01, "at most"), *out] if over else out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=1_000_000)
    parser.add_argument("--density", type=float, nargs="+", default=[0.001, 0.01, 0.05, 0.2, 0.5])
    parser.add_argument("--codec", nargs="+", default=codec_names("bits"), choices=codec_names("bits"))
    parser.add_argument("--classes", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to add the rows as JSON")
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    args = parser.parse_args()
    rows = [measure(args.numel, p, name, args.classes) for p in args.density for name in args.codec]
    print(f"{'p':>6} {'codec':13} {'bpp':>8} {'H(p)':>8} {'/ H':>6} {'wrong bits':>10} {'enc ns':>8} {'dec ns':>8}")
    for r in rows:
        print(
            f"{r['density']:6} {r['codec']:13} {r['bpp']:8.4f} {r['entropy_bpp']:8.4f} {r['over_entropy']:6.3f} "
            f"{r['wrong_bits']:10} {r['encode_ns']:8.2f} {r['decode_ns']:8.2f}"
        )
    if args.ratios:
        save(args.ratios, figures(rows))
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(json.dumps(kept + rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
