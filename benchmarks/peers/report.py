"""What the kept runs say: bits to an accuracy, the ratios that the project promises, tables and the picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.ratios import Ratio  # noqa: E402

Run = Mapping[str, Any]
SAMPLED = ("drawstep at 0.05", "drawstep at 0.03", "drawstep", "drawstep in blocks at 0.03", "klms at 0.03")
EXACT = ("deltastep", "deltastep to 1", "deltamask exact")
DENSE_BITS = 64.0  # FedAvg with float32, up and down


def bits_a_round(run: Run) -> list[tuple[float, float]]:
    """Bits a parameter and client of each round, whole frames: up, and both directions."""
    each = 8 / run["clients"] / run["numel"]
    return [
        (each * line["uplink_bytes"], each * (line["uplink_bytes"] + line["downlink_bytes"]))
        for line in run["rounds"]
    ]


def bits_to(run: Run, accuracy: float) -> tuple[float, float] | None:
    """Bits a parameter and client, up and in both directions, until the thresholded accuracy is reached."""
    up = both = 0.0
    for line, (more_up, more) in zip(run["rounds"], bits_a_round(run), strict=True):
        up, both = up + more_up, both + more
        if line["accuracy_threshold"] >= accuracy:
            return up, both
    return None


def rounds_to(run: Run, accuracy: float) -> int | None:
    """The first round with that thresholded accuracy."""
    return next((line["round"] for line in run["rounds"] if line["accuracy_threshold"] >= accuracy), None)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def late_bits(run: Run) -> float:
    """Most bits a parameter in both directions in a round from round 10 on (or in the last one)."""
    rounds = bits_a_round(run)
    return max(both for _, both in rounds[9:] or rounds[-1:])


def final_accuracy(run: Run) -> float:
    """Thresholded accuracy, mean of the last three rounds: one round's test accuracy jumps."""
    return mean([line["accuracy_threshold"] for line in run["rounds"][-3:]])


def named(runs: Sequence[Run], name: str) -> list[Run]:
    """Runs of one row, a seed each."""
    return [run for run in runs if run["name"] == name]


def paired(runs: Sequence[Run], *names: str) -> list[list[Run]]:
    """The runs of each row with the seeds that all of these rows have, in their order."""
    rows = [{run["seed"]: run for run in named(runs, name)} for name in names]
    seeds = sorted(set.intersection(*(set(row) for row in rows)))
    return [[row[seed] for seed in seeds] for row in rows]


def ratios(runs: Sequence[Run], accuracy: float, data: str) -> list[Ratio]:
    """What is promised; two rows are compared over the seeds that both have.

    Nothing is said of bits to an accuracy that a seed did not reach.
    """

    def up(mine: Sequence[Run]) -> float | None:
        found = [bits_to(run, accuracy) for run in mine]
        return None if not found or None in found else mean([f[0] for f in found if f])

    def ideal(mine: Sequence[Run]) -> float | None:
        found = [rounds_to(run, accuracy) for run in mine]  # one bit a round
        return None if not found or None in found else mean([float(r) for r in found if r])

    to = f"{data}: uplink bits to {accuracy:.0%}"
    peers = [("fedpm", "FedPM's ideal bit", ideal, name, 25.0) for name in SAMPLED]
    peers += [("fedpm", "FedPM's ideal bit", ideal, name, 7.0) for name in EXACT]
    peers += [("deltamask faithful", "DeltaMask faithful", up, name, 3.0) for name in SAMPLED + EXACT]
    out = []
    for peer, title, cost, name, target in peers:
        theirs, mine = paired(runs, peer, name)
        if (over := cost(theirs)) and (under := up(mine)):
            out.append(Ratio(f"{to}: {title} / {name}", over / under, target))
    for name, target in (*((name, 200.0) for name in SAMPLED), *((name, 50.0) for name in EXACT)):
        if mine := named(runs, name):
            label = f"{data}: both directions, a round from 10 on: FedAvg float32 / {name}"
            out.append(Ratio(label, DENSE_BITS / max(late_bits(run) for run in mine), target))
    for name in SAMPLED:
        if mine := named(runs, name):
            sent = mean([mean([up for up, _ in bits_a_round(run)]) for run in mine])
            out.append(Ratio(f"{data}: {name}, mean uplink, bits a parameter and round", sent, 0.09, "at most"))
    finals = [final_accuracy(run) for run in named(runs, "fedpm")]
    for name in (*SAMPLED, *EXACT[:2]):
        theirs, mine = paired(runs, "fedpm", name)
        if mine:
            ahead = [final_accuracy(m) - final_accuracy(t) for m, t in zip(mine, theirs, strict=True)]
            span = max(finals) - min(finals)
            label = f"{data}: last accuracy, {name} - fedpm, {len(mine)} seeds (fedpm's span {span:.4f})"
            out.append(Ratio(label, mean(ahead), -span))
    return out


def table(runs: Sequence[Run], targets: Sequence[float]) -> str:
    """Markdown: final accuracy, rounds and bits to each accuracy (up / both), bits a round from 10 on."""
    heads = ["method", "seeds", "accuracy of the last three rounds (range)"]
    heads += [f"to {t:.0%}: rounds; bits up / both" for t in targets] + ["both, most in a round from 10 on"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in dict.fromkeys(run["name"] for run in runs):
        mine = named(runs, name)
        final = [final_accuracy(run) for run in mine]
        cells = [name, str(len(mine)), f"{mean(final):.4f} ({min(final):.4f} to {max(final):.4f})"]
        for target in targets:
            found = [(rounds_to(run, target), bits_to(run, target)) for run in mine]
            reached = [(r, b) for r, b in found if r and b]
            if len(reached) < len(found):
                cells.append(f"{len(reached)} of {len(found)} seeds")
            else:
                bits = " / ".join(f"{mean([b[i] for _, b in reached]):.3g}" for i in (0, 1))
                cells.append(f"{mean([r for r, _ in reached]):.3g}; {bits}")
        cells.append(f"{max(late_bits(run) for run in mine):.3g}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Accuracy against bits a parameter so far, both directions: a line a row, a band its seeds."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes, hues = figure.subplots(), colormaps["tab20"]
    for number, name in enumerate(dict.fromkeys(run["name"] for run in runs)):
        mine = named(runs, name)
        length = min(len(run["rounds"]) for run in mine)
        sent = np.mean([np.cumsum([both for _, both in bits_a_round(run)])[:length] for run in mine], axis=0)
        wrong = np.array([[1 - line["accuracy_threshold"] for line in run["rounds"][:length]] for run in mine])
        axes.plot(sent, wrong.mean(0), marker=".", linewidth=1.3, color=hues(number % 20), label=name)
        axes.fill_between(sent, wrong.min(0), wrong.max(0), color=hues(number % 20), alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="bits a parameter and client so far, up and down")
    axes.set(ylabel="error (1 - thresholded accuracy), test set", title=title)
    axes.grid(visible=True, which="both", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(path, dpi=150, format="png")
