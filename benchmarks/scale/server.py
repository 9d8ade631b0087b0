"""Server seconds a round, without Flower: decode, aggregate and make the downlink, by clients and by parameters.

    python benchmarks/scale/server.py [--most 10000] [--only fedpm,klms] [--plot docs/scale.png]

Frames are made once (four devices', reused), so no time goes into clients. What a round then costs is what
`MaskStrategy` does with each reply (`read_reply`, `reconstruct`, `aggregate`), and what it says in the next round
(`broadcast`, `pack`, once where all hear the same). One core, a process a point, so that peak memory is that
point's.
N = 10 ... 10,000 at d = 10^5 and 10^6, and d = 10^5 ... 10^8 at N = 10; points are kept in
benchmarks/results/scale-server.json, and the slopes of log seconds by log N and by log d are printed: 1 is linear.

CPU seconds, since others may use the machine; the best of up to three tries. A device's theta differs from the
server's by 0.01 on average (see `synthetic`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.scale.synthetic import DEVICES, DIGEST, METHODS, begun, built, decoded, frames  # noqa: E402
from fedmask_flwr.methods import Turn, Update  # noqa: E402
from fedmask_flwr.wire import BitCodec, pack  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scale-server.json"
CLIENTS, PARAMETERS = (10, 100, 1000, 10_000), (10**5, 10**6, 10**7, 10**8)
FIXED_D, FIXED_N = (10**5, 10**6), 10
ENOUGH = 3.0  # seconds after which a point is not tried again


def serve_round(method, state, made, clients):
    """One round as the strategy runs it; the new state, seconds of each part, and bytes."""
    spent = {"decode": 0.0, "aggregate": 0.0, "downlink": 0.0}
    up = 0

    def updates():
        nonlocal up
        for client in range(clients):
            began = time.process_time()
            frame = made[client % DEVICES]
            received, payload = decoded(method, state, frame, client % DEVICES)
            rate = max((c.flip_rate for c in received.codecs.values() if isinstance(c, BitCodec)), default=0.0)
            update = Update(client, payload, 1.0, rate, received.frame.fields)
            method.check(state, update)
            up += len(frame)
            spent["decode"] += time.process_time() - began
            yield update

    began = time.process_time()
    state = method.advance(state, Turn(7, 2, 99, 0))
    after = method.aggregate(state, updates())
    after = method.missed(after, []) if method.personal else after
    spent["aggregate"] = time.process_time() - began - spent["decode"]
    began = time.process_time()
    after = method.advance(after, Turn(7, 3, 99, 0))
    coded, down = {}, 0
    for client in range(clients):
        payload = method.broadcast(after, client) if method.personal or not coded else payload  # noqa: F821
        if id(payload) not in coded:
            known = method.heard(method.recall(after, client))
            coded[id(payload)] = (
                payload,
                len(pack(payload, digest=DIGEST, round_=3, known=known, codecs=method.codecs)),
            )
        down += coded[id(payload)][1]
    spent["downlink"] = time.process_time() - began
    return after, spent, up, down


def memory(field: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field + ":"))


def point(name: str, numel: int, clients: int) -> dict:
    """One round of one size, in this process, once a small one has loaded (and compiled) everything."""
    rng = np.random.Generator(np.random.Philox(key=1))
    small = built(name, 10**5)
    first = begun(small, rng)
    serve_round(small, first, frames(small, first, rng), min(clients, 300))
    base = memory("VmRSS")  # Python, torch and the package
    method = built(name, numel)
    state = begun(method, rng)
    made = frames(method, state, rng)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    tries, began = [], time.process_time()
    while not tries or (len(tries) < 3 and time.process_time() - began < ENOUGH):
        cpu = time.process_time()
        _, spent, up, down = serve_round(method, state, made, clients)
        tries.append((time.process_time() - cpu, spent))
    total, spent = min(tries, key=lambda found: found[0])
    return {
        "method": name,
        "parameters": method.numel,
        "clients": clients,
        "cpu_s": round(total, 4),
        **{f"{part}_s": round(value, 4) for part, value in spent.items()},
        "up_bytes_a_client": round(up / clients),
        "down_bytes_a_client": round(down / clients),
        "base_mb": round(base, 1),
        "before_mb": round(before, 1),
        "peak_mb": round(memory("VmHWM"), 1),
        "load": round(os.getloadavg()[0], 1),
    }


def key_of(row: dict) -> tuple[str, int, int]:
    """What names a point."""
    return row["method"], row["parameters"], row["clients"]


def slope(points: list[dict], axis: str, least: int = 0) -> float:
    """Of log CPU seconds by log ``axis``, by least squares, from ``least`` on."""
    pairs = [(p[axis], p["cpu_s"]) for p in points if p[axis] >= least]
    x, y = np.log10(np.array(pairs)).T
    return float(np.polyfit(x, y, 1)[0])


def lines_of(rows: list[dict]) -> list[tuple[str, str, int, list[dict]]]:
    """Method, what varies, what is fixed at how much, and the points, ascending."""
    found = []
    sweeps = [("clients", "parameters", d) for d in FIXED_D] + [("parameters", "clients", FIXED_N)]
    for axis, other, fixed in sweeps:
        for name in METHODS:
            some = [row for row in rows if row["method"] == name and row[other] == fixed]
            if len(some) > 1:
                found.append((name, axis, fixed, sorted(some, key=lambda row: row[axis])))
    return found


def report(rows: list[dict]) -> str:
    """A table a sweep, in Markdown, and slopes."""
    out, swept = [], lines_of(rows)
    for sweep in dict.fromkeys((axis, fixed) for _, axis, fixed, _ in swept):
        axis, fixed = sweep
        points = {name: {row[axis]: row for row in some} for name, *of, some in swept if tuple(of) == sweep}
        other = f"d = {fixed:,}" if axis == "clients" else f"{fixed} clients"
        out += [
            "",
            f"| {axis}, {other} | " + " | ".join(METHODS) + " | peak MB |",
            "|---:|" + "---:|" * (len(METHODS) + 1),
        ]
        for size in sorted({size for some in points.values() for size in some}):
            found = [points.get(name, {}).get(size) for name in METHODS]
            cells = [f"{row['cpu_s']:.2f} s" if row else "" for row in found]
            peak = max(row["peak_mb"] for row in found if row)
            out.append(f"| {size:,} | " + " | ".join(cells) + f" | {peak:.0f} |")
    out.append("")
    for name, axis, fixed, some in lines_of(rows):
        ends = [row["cpu_s"] / row[axis] for row in some[-2:]]
        out.append(
            f"{name} by {axis} at {fixed:,}: slope {slope(some, axis):.3f}, without the smallest "
            f"{slope(some[1:], axis) if len(some) > 2 else float('nan'):.3f}; one costs {ends[1] / ends[0]:.2f} "
            "times as much at the largest as before"
        )
    return "\n".join(out)


def plot(rows: list[dict], path: Path) -> None:
    """Seconds of CPU a round by clients and by parameters, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = dict(zip(("clients", "parameters"), figure.subplots(1, 2, sharey=True), strict=True))
    colours = dict(zip(METHODS, ("tab:blue", "tab:orange", "tab:red", "tab:green", "tab:purple"), strict=True))
    for name, axis, fixed, some in lines_of(rows):
        x, y = np.array([(row[axis], row["cpu_s"]) for row in some]).T
        what = f"{name}, d = {fixed:,}" if axis == "clients" else name
        label = f"{what}: slope {slope(some[1:] if len(some) > 2 else some, axis):.2f}"
        dash = "--" if fixed == FIXED_D[0] else "-"
        panels[axis].plot(x, y, dash, marker="o", markersize=4, color=colours[name], label=label)
        panels[axis].plot(x, y[-1] * x / x[-1], linestyle=":", linewidth=0.8, color=colours[name])
    titles = {"clients": "clients a round", "parameters": f"parameters, {FIXED_N} clients a round"}
    for axis, axes in panels.items():
        axes.set(xscale="log", yscale="log", xlabel=titles[axis])
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False, fontsize="xx-small", loc="upper left")
    panels["clients"].set_ylabel("server CPU seconds a round, one core")
    figure.suptitle(
        "Decode, aggregate and make the downlink; dotted: exactly linear through the last point. Slopes are "
        "without the smallest size",
        fontsize="small",
    )
    figure.savefig(path, dpi=150, format="png")


def main() -> None:
    """Measure what was asked for; a point replaces the kept one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(METHODS))
    parser.add_argument("--most", type=int, default=CLIENTS[-1], help="clients, at most")
    parser.add_argument("--largest", type=int, default=PARAMETERS[-1], help="parameters, at most")
    parser.add_argument("--pairs", type=float, default=1e10, help="parameters times clients, at most")
    parser.add_argument("--again", action="store_true", help="measure what is kept, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--table", action="store_true", help="print what is kept")
    parser.add_argument("--point", nargs=3, metavar=("METHOD", "D", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(args.point[0], int(args.point[1]), int(args.point[2]))))
        return
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    sizes = [(d, n) for d in FIXED_D for n in CLIENTS] + [(d, FIXED_N) for d in PARAMETERS]
    sizes = [(d, n) for d, n in sizes if n <= args.most and d <= args.largest and d * n <= args.pairs]
    for name in [] if args.table else args.only.split(","):
        for numel, clients in sorted(set(sizes), key=lambda pair: pair[0] * pair[1]):
            if not args.again and any(key_of(row) == (name, numel, clients) for row in rows):
                continue
            command = [sys.executable, __file__, "--point", name, str(numel), str(clients)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            row = json.loads(done.stdout.splitlines()[-1])
            print(json.dumps(row), flush=True)
            rows = [old for old in rows if key_of(old) != key_of(row)] + [row]
            args.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(report(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
