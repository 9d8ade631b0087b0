"""What a run looks like: a table of rounds in the terminal, a curve of accuracy against bytes in a file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

__all__ = ["MODES", "RoundTable", "human_bytes", "plot_curve", "printable", "summary"]

MODES = ("sampled", "threshold", "expected")
_WIDE = ("round", *MODES, "up/client", "down/client", "bpp up", "bpp down", "ok", "failed", "seconds")
_WIDTHS = (5, 8, 10, 9, 10, 12, 8, 9, 4, 7, 8)
_ROOM = 8  # terminal lines the table leaves to its header, its footer and the prompt


def human_bytes(n: float) -> str:
    """Write a number of bytes in decimal units: 12.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 999.5:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def printable(text: str) -> str:
    """Text of somebody else's for a terminal: what is not printable, such as an escape, as its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    ok, failed = int(row.get("clients_ok", 0)), int(row.get("clients_failed", 0))
    up, down = row.get("uplink_bytes"), row.get("downlink_bytes")

    def figure(key: str, form: str) -> str:
        return format(float(row[key]), form) if row.get(key) is not None else "-"

    return (
        str(row["round"]),
        *(figure(f"accuracy_{mode}", ".4f") for mode in MODES),
        human_bytes(up / max(ok, 1)) if up is not None else "-",
        human_bytes(down / max(ok + failed, 1)) if down is not None else "-",
        figure("uplink_bpp", ".4f"),
        figure("downlink_bpp", ".4f"),
        str(ok),
        str(failed),
        figure("seconds", ".1f"),
    )


class RoundTable:
    """A row a round: live in a terminal, plain lines elsewhere. Use it as a context manager.

    Parameters
    ----------
    console : rich.console.Console
    rounds : int
        Rounds the run will have, for the progress line.
    """

    def __init__(self, console: Console, rounds: int) -> None:
        self.console, self.rounds = console, rounds
        self.rows: dict[int, tuple[str, ...]] = {}
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self._view, transient=True)

    def __enter__(self) -> RoundTable:
        if self.console.is_terminal:
            self.live.start()
        else:
            self._plain(_WIDE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()
            if self.rows:
                self.console.print(self._table(len(self.rows)))

    def add(self, row: Mapping[str, Any]) -> None:
        """Show one line of metrics.jsonl; a round shown before is replaced."""
        cells = _cells(row)
        self.rows[int(row["round"])] = cells
        if self.first is None:
            self.first = int(row["round"]), time.monotonic()
        if not self.console.is_terminal:
            self._plain(cells)

    def _plain(self, cells: Sequence[str]) -> None:
        line = "".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True))
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _view(self) -> Group:
        room = max(3, self.console.size.height - _ROOM)
        return Group(self._table(room), self._progress())

    def _table(self, most: int) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in _WIDE:
            table.add_column(name, justify="right", no_wrap=True)
        for number in sorted(self.rows)[-most:]:
            style = "red" if self.rows[number][9] != "0" else None
            table.add_row(*self.rows[number], style=style)
        return table

    def _progress(self) -> Text:
        passed = time.monotonic() - self.began
        if self.first is None:
            return Text(f"starting Flower and Ray ... {passed:.0f} s", style="dim")
        last, (first, at) = max(self.rows), self.first
        text = f"round {last} of {self.rounds}, {passed:.0f} s"
        if last > first:
            left = (self.rounds - last) * (time.monotonic() - at) / (last - first)
            text += f", about {left:.0f} s left"
        return Text(text, style="dim")


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Give one line: final accuracy, mean bits per parameter up, bytes both ways."""
    if not rows:
        return "no round was completed"
    last = rows[-1]
    accuracy = ", ".join(
        f"{mode} {last[f'accuracy_{mode}']:.4f}" for mode in MODES if last.get(f"accuracy_{mode}") is not None
    )
    bpps = [float(r["uplink_bpp"]) for r in rows if r.get("uplink_bpp") is not None and r.get("clients_ok")]
    bpp = f"; mean uplink {sum(bpps) / len(bpps):.4f} bits per parameter" if bpps else ""
    up = sum(float(r.get("uplink_bytes") or 0) for r in rows)
    down = sum(float(r.get("downlink_bytes") or 0) for r in rows)
    return f"accuracy {accuracy or 'unknown'}{bpp}; total {human_bytes(up)} up, {human_bytes(down)} down"


def plot_curve(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw accuracy (all modes) against the bytes sent so far, both ways, as a PNG.

    Parameters
    ----------
    metrics : sequence of mapping
        Lines of metrics.jsonl; ``uplink_bytes`` and ``downlink_bytes`` are a round's totals over its clients.
    path : Path
        File to write.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    # The object API: no pyplot, so no global state and no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    total, megabytes = 0.0, []
    for row in metrics:
        total += float(row.get("uplink_bytes") or 0) + float(row.get("downlink_bytes") or 0)
        megabytes.append(total / 1e6)
    drawn: list[tuple[float, ...]] = []
    for mode in MODES:
        points = [
            (mb, float(row[f"accuracy_{mode}"]))
            for mb, row in zip(megabytes, metrics, strict=True)
            if row.get(f"accuracy_{mode}") is not None
        ]
        # A method with one network says the same thing three times.
        values = tuple(y for _, y in points)
        if points and values not in drawn:
            axes.plot(*zip(*points, strict=True), marker=".", label=mode)
            drawn.append(values)
    if megabytes and megabytes[0] > 0 and megabytes[-1] > 50 * megabytes[0]:
        axes.set_xscale("log")
    axes.set(xlabel="sent so far, up and down, all clients (MB)", ylabel="test accuracy")
    axes.grid(visible=True, alpha=0.3)
    if len(drawn) > 1:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=150, format="png")
