"""Time a whole-vector filter query against pyfusefilter's own ways of asking, in one run.

Ours decodes the codec's body, with machine code where there is numba, and in numpy. The public API
(`Fuse8.contains`, one Python call and one xxhash a key) and the raw cffi loop are timed on a subset of positions
and scaled: a key costs the same wherever it is. Run: python benchmarks/fuse_query.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1])]

from benchmarks.ratios import Ratio, save  # noqa: E402
from fedmask_flwr import jit  # noqa: E402
from fedmask_flwr.wire import CODECS, SideInfo, from_positions, fuse  # noqa: E402

RESULTS = Path(__file__).parent / "results/fuse_query.json"
CASES = ((10_000_000, 0.001), (10_000_000, 0.01), (10_000_000, 0.05), (10_000_000, 0.2), (86_000_000, 0.2))


def _best(call, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times)


def compare(numel: int, density: float, subset: int) -> dict[str, float]:
    """Nanoseconds of processor time per position of the four ways, and the ratios to ours."""
    from pyfusefilter import Fuse8
    from pyfusefilter._xorfilter import ffi, lib

    rng, known, coder = np.random.default_rng(0), SideInfo((numel,)), CODECS["fuse8"]
    keys = np.flatnonzero(rng.random(numel, dtype=np.float32) < density)
    bits = from_positions(keys, numel)
    start = time.thread_time()
    body = coder.encode(bits, known)
    build = time.thread_time() - start
    coder.decode(body, known)  # loads the machine code
    ours = _best(lambda: coder.decode(body, known)) / numel
    before = os.environ.get("FEDMASK_JIT")
    os.environ["FEDMASK_JIT"] = "0"
    plain = _best(lambda: coder.decode(body, known), 1 if numel > 2e7 else 2) / numel
    if before is None:
        del os.environ["FEDMASK_JIT"]
    else:
        os.environ["FEDMASK_JIT"] = before

    api = Fuse8(keys[:subset].tolist())
    asked = rng.integers(0, numel, subset).tolist()
    public = _best(lambda: [api.contains(key) for key in asked], 2) / subset

    raw = ffi.new("binary_fuse8_t *")
    lib.binary_fuse8_allocate(keys.size, raw)
    own = keys.astype(np.uint64)
    lib.binary_fuse8_populate(ffi.from_buffer("uint64_t[]", own), own.size, raw)
    loop = _best(lambda: [lib.binary_fuse8_contain(key, raw) for key in asked], 2) / subset
    lib.binary_fuse8_free(raw)
    return {
        "numel": numel,
        "density": density,
        "keys": int(keys.size),
        "filters": len(fuse.parse_ranges(body, 1, numel)),
        "compiled": jit.available(),
        "bytes": len(body),
        "build_ns_per_key": 1e9 * build / keys.size,
        "ours_ns": 1e9 * ours,
        "numpy_ns": 1e9 * plain,
        "public_api_ns": 1e9 * public,
        "cffi_loop_ns": 1e9 * loop,
        "api_over_ours": public / ours,
        "cffi_over_ours": loop / ours,
    }


def main() -> None:
    """Print a table, and write the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, help="with --density instead of the five cases")
    parser.add_argument("--density", type=float, nargs="+", default=[0.001, 0.01, 0.05, 0.2])
    parser.add_argument("--subset", type=int, default=200_000)
    parser.add_argument("--quick", action="store_true", help="2 million positions, no file")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--ratios", type=Path, help="JSON of the figures, for benchmarks/bench.py")
    args = parser.parse_args()
    if args.quick:
        args.numel, args.density, args.subset = 2_000_000, [0.01, 0.2], 20_000
    cases = [(args.numel, p) for p in args.density] if args.numel else CASES
    rows = [compare(numel, p, args.subset) for numel, p in cases]
    print("ns per position         filters   ours  numpy  public API  cffi loop  API/ours  cffi/ours")
    for r in rows:
        print(
            f"d={r['numel']:<10} p={r['density']:<7} {r['filters']:9} {r['ours_ns']:6.1f} {r['numpy_ns']:6.1f} "
            f"{r['public_api_ns']:11.0f} {r['cffi_loop_ns']:10.0f} {r['api_over_ours']:9.1f} "
            f"{r['cffi_over_ours']:10.1f}"
        )
    if args.ratios:
        slowest = max(r["ours_ns"] for r in rows)
        least = min(r["api_over_ours"] for r in rows)
        name = "filter query, any density"
        save(
            args.ratios,
            [
                Ratio(f"{name}: ns a position", slowest, 10.0, "at most"),
                Ratio(f"{name}: pyfusefilter's API / ours", least, 20.0),
            ],
        )
    if not args.numel:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
