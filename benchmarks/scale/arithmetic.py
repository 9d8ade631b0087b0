"""The same arithmetic for larger federations: bytes, server seconds and memory of a round, from measured constants.

    python benchmarks/scale/arithmetic.py

Reads benchmarks/results/scale-server.json and scale-layer.json, and prints the table of docs/scale.md: computed,
not measured. The constants that it takes are printed first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
FLOWER_UP, FLOWER_DOWN, IDLE_UP, IDLE_CALLS = 11_250, 2_860, 227, 1 / 3 + 1 / 24  # docs/wire.md: bytes; a second
DENSE = 4.0  # bytes a parameter of float32 FedAvg, either way
SHOWN = ("fedpm", "deltamask", "drawstep")
CASES = (  # devices, share that answers in a round, parameters
    (1_000, 0.1, 10**6),
    (10_000, 0.1, 10**7),
    (100_000, 0.01, 10**8),
    (1_000_000, 0.01, 10**7),
    (1_000_000, 0.01, 10**8),
    (1_000_000, 0.001, 10**9),
)


def kept() -> list[dict]:
    """What `server.py` measured."""
    return json.loads((RESULTS / "scale-server.json").read_text())


def counts_bytes(clients: int) -> float:
    """Bytes a parameter of counts of so many replies, as measured at the number of clients nearest to it."""
    rows = [row for row in kept() if row["method"] == "fedpm" and row["parameters"] == 10**6]
    row = min(rows, key=lambda row: abs(math.log(row["clients"] / clients)))
    return row["down_bytes_a_client"] / row["parameters"]


def constants() -> dict[str, dict[str, float]]:
    """Of each method: nanoseconds a parameter and client, microseconds a client, bytes a parameter."""
    points = kept()
    layer = {
        row["method"]: row["tell_us"] + row["hear_us"]
        for row in json.loads((RESULTS / "scale-layer.json").read_text())
        if row["clients"] == 10_000
    }
    found = {}
    for name in SHOWN:
        own = [row for row in points if row["method"] == name]
        many = max(own, key=lambda row: (row["clients"] * row["parameters"], row["clients"]))
        large = max((row for row in own if row["clients"] == 10), key=lambda row: row["parameters"])
        d = large["parameters"]
        found[name] = {
            "ns": (many["decode_s"] + many["aggregate_s"]) / many["clients"] / many["parameters"] * 1e9,
            "once_ns": large["downlink_s"] / d * 1e9,
            "client_us": layer.get(name, layer["fedpm"]),
            "bytes": 1e6 * (large["peak_mb"] - large["base_mb"]) / d,
            "up": large["up_bytes_a_client"] / d,
        }
    return found


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} PB"


def span(seconds: float) -> str:
    """Seconds for people."""
    for limit, one, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / one:.2g} {unit}"
    return f"{seconds / 86_400:.2g} d"


def main() -> None:
    """Print the constants and the table."""
    found = constants()
    for name, c in found.items():
        print(
            f"{name}: {c['ns']:.3g} ns a parameter and client, {c['once_ns']:.3g} ns a parameter once, "
            f"{c['client_us']:.0f} us a client, {c['bytes']:.3g} B a parameter, "
            f"{8 * c['up']:.3g} bits up"
        )
    names = " / ".join(found)
    print(f"\n| devices | answer | parameters | up: {names} | down | server CPU: {names} | memory | dense |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for devices, share, d in CASES:
        n = round(devices * share)
        up = [n * (c["up"] * d + FLOWER_UP) for c in found.values()]
        cpu = [n * (c["ns"] * d / 1e9 + c["client_us"] / 1e6) + c["once_ns"] * d / 1e9 for c in found.values()]
        down = n * (counts_bytes(n) * d + FLOWER_DOWN)
        memory = [found["fedpm"]["bytes"] * d + n * c["up"] * d for c in found.values()]
        dense = n * (2 * DENSE * d + FLOWER_UP + FLOWER_DOWN)
        print(
            f"| {devices:,} | {n:,} | 10^{len(str(d)) - 1} | {' / '.join(map(size, up))} | {size(down)} "
            f"| {' / '.join(map(span, cpu))} | {' / '.join(map(size, memory))} | {size(dense)} |"
        )
    print("\n| devices connected | calls a second | waiting, up |\n|---:|---:|---:|")
    for devices in (1_000, 10_000, 100_000, 1_000_000):
        print(f"| {devices:,} | {devices * IDLE_CALLS:,.0f} | {size(devices * IDLE_UP)}/s |")


if __name__ == "__main__":
    main()
