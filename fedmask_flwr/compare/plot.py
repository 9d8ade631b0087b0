"""The picture of a comparison: accuracy against bytes, one colour a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from .results import Result

__all__ = ["curves", "plot"]

PANELS = (
    ("client_accuracy_mean", "accuracy on clients' own test data (mean)"),
    ("accuracy_threshold", "accuracy of the server's network (test set)"),
)
_DASHES = ("-", "--", ":", "-.")


def curves(results: Sequence[Result], name: str) -> dict[str, np.ndarray]:
    """Give each method's curve of one metric: (rounds, 4), bytes so far, then mean, least and greatest over seeds.

    Bytes are of training, up and down, all clients, mean over seeds. Rounds that some run lacks, or in which some
    run has no such metric, are left out; so are methods without any.
    """
    found = {}
    for label in dict.fromkeys(result.label for result in results):
        runs = [_points(result.rows, name) for result in results if result.label == label]
        rounds = sorted(set.intersection(*(set(run) for run in runs)))
        if rounds:
            sent, value = (np.array([[run[r][i] for r in rounds] for run in runs]) for i in (0, 1))
            found[label] = np.stack([sent.mean(0), value.mean(0), value.min(0), value.max(0)], axis=1)
    return found


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, tuple[float, float]]:
    sent = accumulate(float(row.get("uplink_bytes") or 0) + float(row.get("downlink_bytes") or 0) for row in rows)
    pairs = zip(rows, sent, strict=True)
    return {row["round"]: (total, float(row[name])) for row, total in pairs if row.get(name) is not None}


def plot(results: Sequence[Result], path: Path, title: str = "") -> None:
    """Draw mean accuracy over seeds, with a band from least to greatest, against the bytes sent so far, as a PNG.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    # The object API: no pyplot, so no global state and no display.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(words, found) for name, words in PANELS if (found := curves(results, name))]
    labels = list(dict.fromkeys(result.label for result in results))
    hues = colormaps["tab20" if len(labels) > 10 else "tab10"]
    height = max(4.5, 0.24 * len(labels) + 1)
    figure = Figure(figsize=(5.5 * max(len(panels), 1) + 3, height), layout="constrained")
    FigureCanvasAgg(figure)
    lines: dict[str, Any] = {}
    for axes, (words, found) in zip(
        figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels, strict=False
    ):
        for label, (sent, mean, low, high) in ((label, curve.T) for label, curve in found.items()):
            number = labels.index(label)
            style = {"color": hues(number % hues.N), "linestyle": _DASHES[number // hues.N % len(_DASHES)]}
            mb = np.maximum(sent, 1.0) / 1e6
            (lines[label],) = axes.plot(mb, mean, marker=".", markersize=3, linewidth=1.3, **style)
            axes.plot(mb[-1:], mean[-1:], marker="o", markersize=5, **style)
            axes.fill_between(mb, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set(xscale="log", xlabel="sent so far, up and down, all clients (MB)", ylabel=words)
        axes.grid(visible=True, alpha=0.3)
    if lines:
        order = [label for label in labels if label in lines]
        figure.legend(
            [lines[n] for n in order],
            [_plain(n) for n in order],
            loc="outside right upper",
            fontsize="small",
            frameon=False,
        )
    figure.suptitle(_plain(title), fontsize="medium")
    figure.savefig(path, dpi=150, format="png")


def _plain(text: str) -> str:
    """Keep matplotlib from reading a formula, or a name to leave out of the legend."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")
