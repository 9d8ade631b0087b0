"""A comparison as files and in the terminal: compare.json, table.md, compare.png."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedmask_flwr.checkpoint import write_atomic
from fedmask_flwr.show import human_bytes

from .plot import plot
from .results import FIGURES, Result, figures, over_seeds, read, shared

__all__ = ["PICTURE", "REPORT", "TABLE", "Summary", "summarise", "terminal_tables", "write"]

REPORT, TABLE, PICTURE = "compare.json", "table.md", "compare.png"
log = logging.getLogger(__name__)


def _share(value: float) -> str:
    return f"{value:.4f}"


def _bits(value: float) -> str:
    return human_bytes(value / 8)


def _seconds(value: float) -> str:
    return f"{value:.3g}"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("accuracy_sampled", "sampled", _share),
    ("accuracy_threshold", "threshold", _share),
    ("accuracy_expected", "expected", _share),
    ("client_accuracy_mean", "clients", _share),
    ("client_accuracy_worst_decile", "worst 10%", _share),
    ("uplink_bytes", "up", human_bytes),
    ("downlink_bytes", "down", human_bytes),
    ("uplink_bpp", "bpp up", _share),
    ("client_model_bits", "on device", _bits),
    ("seconds", "s/round", _seconds),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One method over its complete runs: (mean, least, greatest) of each figure; ``missing`` names the others."""

    label: str
    method: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    figures: dict[str, tuple[float, float, float]]
    failures: int
    missing: tuple[str, ...]


def summarise(results: Sequence[Result]) -> list[Summary]:
    """One summary a method, in the order in which they first come."""
    found = []
    for label in dict.fromkeys(result.label for result in results):
        mine = [result for result in results if result.label == label]
        whole = [result for result in mine if result.complete]
        runs = [figures(result.rows) for result in whole]
        failures = sum(run.get(name, 0.0) for run in runs for name in ("clients_failed", "evaluations_failed"))
        missing = tuple(f"seed {r.seed}: {r.error or 'not complete'}" for r in mine if not r.complete)
        seeds = tuple(r.seed for r in whole)
        found.append(
            Summary(label, mine[0].method, mine[0].settings, seeds, over_seeds(runs), int(failures), missing)
        )
    return found


def write(out: Path) -> list[Summary]:
    """Read a comparison's folder and write its table and picture there.

    Raises
    ------
    CompareError
        When the folder holds no comparison, or runs that cannot be compared.
    OSError
        When the disk refuses.
    """
    results = read(out)
    settings, summaries = shared(results), summarise(results)
    report = {
        "settings": settings,
        "methods": [_as_json(summary) for summary in summaries],
        "runs": [_run_json(result) for result in results],
    }
    write_atomic(out / REPORT, (json.dumps(report).replace('}, {"', '},\n{"') + "\n").encode())
    write_atomic(out / TABLE, markdown(settings, summaries).encode())
    try:
        plot([result for result in results if result.complete], out / PICTURE, _title(settings))
    except ImportError:
        log.warning("no %s without matplotlib: pip install 'fedmask-flwr[sim]'", PICTURE)
    return summaries


def _as_json(summary: Summary) -> dict[str, Any]:
    spread = {name: dict(zip(("mean", "min", "max"), v, strict=True)) for name, v in summary.figures.items()}
    return {
        "label": summary.label,
        "method": summary.method,
        "settings": summary.settings,
        "seeds": list(summary.seeds),
        "figures": spread,
        "failures": summary.failures,
        "missing": list(summary.missing),
    }


def _run_json(result: Result) -> dict[str, Any]:
    names = ("label", "seed", "folder", "complete", "error")
    rows = [{k: row[k] for k in ("round", *FIGURES, "clients_ok") if k in row} for row in result.rows]
    return {name: getattr(result, name) for name in names} | {"rounds": rows}


def _title(settings: Mapping[str, Any]) -> str:
    names = ("data", "model", "clients", "partition", "num-server-rounds", "local-epochs")
    return ", ".join(f"{name} {settings[name]}" for name in names if name in settings)


def _cell(summary: Summary, name: str, form: Callable[[float], str], between: str) -> str:
    if name not in summary.figures:
        return "-"
    mean, low, high = map(form, summary.figures[name])
    return mean if low == high else f"{mean}{between}{low} to {high}"


def markdown(settings: Mapping[str, Any], summaries: Sequence[Summary]) -> str:
    """Write the table as markdown, the settings above it, what is missing below."""
    head = ("method", "seeds", *(title for _, title, _ in COLUMNS), "failures")
    lines = [_title(settings) or "nothing was run", "", _row(head), "|---|" + "---:|" * (len(head) - 1)]
    for s in summaries:
        cells = [_cell(s, name, form, " (") for name, _, form in COLUMNS]
        cells = [f"{cell})" if "(" in cell else cell for cell in cells]
        lines.append(_row((f"`{s.label}`", str(len(s.seeds)), *cells, str(s.failures))))
    lines += [
        "",
        "Mean (least to greatest over seeds), after the last round; bytes are frames, totals over clients.",
    ]
    gaps = [f"- `{s.label}`, {_plain(gap)}" for s in summaries for gap in s.missing]
    return "\n".join([*lines, *(["", "Not in the table:", "", *gaps] if gaps else []), ""])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell) for cell in cells) + " |"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def terminal_tables(summaries: Sequence[Summary]) -> list[Table]:
    """Make the same for a terminal of 80 columns, accuracies apart from costs, ranges on a line of their own.

    Columns that nobody has are left out.
    """
    shown = [column for column in COLUMNS if any(column[0] in s.figures for s in summaries)]
    tables = []
    for costs in (False, True):
        columns = [column for column in shown if ("accuracy" not in column[0]) == costs]
        table = Table(box=None, pad_edge=False)
        table.add_column("method", overflow="fold")
        titles = [title for _, title, _ in columns]
        for title in [*titles, "failures"] if costs else ["seeds", *titles]:
            table.add_column(title, justify="right", no_wrap=True)
        for s in summaries:
            cells = [_short(s, name, form) for name, _, form in columns]
            style = "red" if s.missing or s.failures else None
            cells = [*cells, str(s.failures)] if costs else [str(len(s.seeds)), *cells]
            table.add_row(Text(s.label), *cells, style=style)
        tables.append(table)
    return tables


def _short(summary: Summary, name: str, form: Callable[[float], str]) -> str:
    """Mean, and below it the range: without its leading zeros, and without a unit that the mean has too."""
    if name not in summary.figures:
        return "-"
    values = summary.figures[name]
    mean, low, high = map(form, values)
    if low == high:
        return mean
    if form is _share:
        low, high = (f"{value:.3f}".lstrip("0") for value in values[1:])
    unit = f" {mean.partition(' ')[2]}".rstrip()
    if unit and low.endswith(unit) and high.endswith(unit):
        low, high = low.removesuffix(unit), high.removesuffix(unit)
    return mean if low == high else f"{mean}\n{low}-{high}"
