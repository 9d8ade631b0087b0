"""Time our whole-vector filter query against pyfusefilter's own ways of asking, in one run.

The public API (`Fuse8.contains`, one Python call and one xxhash a key) and the raw cffi loop are timed on a
subset of positions and scaled: a key costs the same wherever it is. Run: python benchmarks/fuse_query.py
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from fedmask_flwr.wire import fuse


def _best(call, repeats=3):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(numel: int, density: float, subset: int) -> dict[str, float]:
    """Nanoseconds per position of the three ways, and the ratios to ours."""
    from pyfusefilter import Fuse8
    from pyfusefilter._xorfilter import ffi, lib

    rng = np.random.default_rng(0)
    keys = np.flatnonzero(rng.random(numel) < density)
    start = time.perf_counter()
    body = fuse.build(keys, 1)
    build = time.perf_counter() - start
    parsed = fuse.parse(body, 1, numel)
    ours = _best(lambda: fuse.query(parsed, numel)) / numel

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
        "bytes": len(body),
        "build_ns_per_key": 1e9 * build / keys.size,
        "ours_ns": 1e9 * ours,
        "public_api_ns": 1e9 * public,
        "cffi_loop_ns": 1e9 * loop,
        "api_over_ours": public / ours,
        "cffi_over_ours": loop / ours,
    }


def main() -> None:
    """Print a table and, as the last line, the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=int, default=10_000_000)
    parser.add_argument("--density", type=float, nargs="+", default=[0.001, 0.01, 0.05])
    parser.add_argument("--subset", type=int, default=200_000)
    args = parser.parse_args()
    rows = [compare(args.numel, p, args.subset) for p in args.density]
    print("ns per position          ours  public API  cffi loop  API/ours  cffi/ours")
    for r in rows:
        print(
            f"d={r['numel']:<10} p={r['density']:<7} {r['ours_ns']:7.1f} {r['public_api_ns']:11.0f} "
            f"{r['cffi_loop_ns']:10.0f} {r['api_over_ours']:9.1f} {r['cffi_over_ours']:10.1f}"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
