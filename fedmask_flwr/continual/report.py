"""``fedmask report`` on a continual run's folder: prints its tables, writes ``report.md`` and ``attention.png``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmask_flwr import track
from fedmask_flwr.checkpoint import write_atomic

from .figures import (
    ACCURACIES,
    LOSSES,
    Attention,
    Entry,
    Line,
    attention,
    forgetting,
    is_count,
    latest,
    number,
    task_ends,
    tasks_of,
)

__all__ = ["ReportError", "draw", "show"]

REPORT, PICTURE = "report.md", "attention.png"
PANELS = (
    ("loss", "Loss, nats an example (lower is better)", LOSSES, "{:.3f}"),
    ("accuracy", "Accuracy", ACCURACIES, "{:.4f}"),
)
LEGEND = (
    "After each task, means over clients. New: the task just learned; base: the first; average: all so far, each "
    "with its own network; mixture: the same, not told the task; latest: all with the newest network. Forgetting: "
    "how much worse an earlier task is than at its best before, mean over those tasks."
)
_WIDEST = 9  # owners that fit 80 columns
_HELPERS = 4  # named where they do not


class ReportError(RuntimeError):
    """A folder holds no continual run, or a damaged one; the message says which."""


def show(folder: Path, console: Console) -> None:
    """Print a continual run's tables; write ``report.md``, and ``attention.png`` where there is attention.

    Raises
    ------
    ReportError
        The folder holds no run, one that is not continual, or one that is damaged or cannot be written.
    """
    config, lines = _read(folder)
    try:
        matrix = attention(latest(lines))
    except ValueError as error:
        raise ReportError(f"{folder / track.METRICS} is damaged: {error}") from error
    panels = _panels(config, lines)
    if not panels and not matrix.learners:
        raise ReportError(
            f"{folder} holds a run without figures of tasks or attention, which only continual runs have "
            "(a scenario, evaluated on its clients); fedmask report also takes the folder of a comparison"
        )
    files = [REPORT]
    try:
        write_atomic(folder / REPORT, _markdown(config, panels, matrix).encode())
        if matrix.learners:
            draw(matrix, folder / PICTURE)
            files.append(PICTURE)
    except ImportError:
        _say(console, f"no {PICTURE} without matplotlib: pip install 'fedmask-flwr[sim]'", "yellow")
    except OSError as error:
        raise ReportError(f"cannot write to {folder}: {error}") from error
    for title, head, body in panels:
        console.print(_table(title, head, body), highlight=False)
        console.print()
    if matrix.learners:
        console.print(_helpers(matrix), highlight=False)
        console.print()
    _say(console, f"files in {folder}: {', '.join(files)}", "dim")


def _say(console: Console, text: str, style: str) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    path = folder / track.CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        lines = track.read_lines(folder / track.METRICS)
    except FileNotFoundError as error:
        raise ReportError(f"{folder} holds no run (there is no {track.CONFIG})") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ReportError(f"{path} is damaged: it is no table of settings")
    if not lines:
        raise ReportError(f"{folder} has no complete round yet: let the run go on, then report it")
    return config, lines


def _scenario_tasks(config: Mapping[str, Any]) -> int:
    """T of the run's scenario; 0 where its table is not on this machine."""
    from fedmask_flwr.config import ConfigError
    from fedmask_flwr.data.scenario import scenario

    try:
        return scenario(str(config.get("scenario") or "")).tasks
    except ConfigError:
        return 0


def _panels(config: Mapping[str, Any], lines: Sequence[Line]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table of tasks; columns that no row has are left out."""
    tasks = max(tasks_of(lines), _scenario_tasks(config))
    if not tasks:
        return []
    rounds = config.get("num-server-rounds")
    if not is_count(rounds) or not rounds:
        raise ReportError(f"num-server-rounds in {track.CONFIG} is {rounds!r}, not a number of rounds")
    ends = task_ends(lines, tasks, rounds)
    found = []
    for kind, title, columns, form in PANELS:
        here = [(name, key) for name, key in columns if any(number(lines[i].get(key)) is not None for _, i in ends)]
        lost = [forgetting(lines[: i + 1], task + 1).get(kind) for task, i in ends]
        if not here and not any(value is not None for value in lost):
            continue
        body = []
        for (task, i), forgot in zip(ends, lost, strict=True):
            values = [*(number(lines[i].get(key)) for _, key in here), forgot]
            cells = ["-" if value is None else form.format(value) for value in values]
            body.append([str(task), str(lines[i]["round"]), *cells])
        found.append((title, ["task", "round", *(name for name, _ in here), "forgetting"], body))
    return found


def _table(title: str, head: Sequence[str], body: Iterable[Sequence[str | Text]]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for name in head:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in body:
        table.add_row(*cells)
    return table


def _name(entry: Entry) -> str:
    return f"c{entry[0]} t{entry[1]}"


def _cells(row: npt.NDArray[np.float64], largest: Callable[[str], Any]) -> list[Any]:
    top = np.nanmax(row)
    texts = ["" if np.isnan(alpha) else f"{alpha:+.2f}" for alpha in row]
    return [largest(text) if alpha == top else text for text, alpha in zip(texts, row, strict=True)]


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def _helpers(matrix: Attention) -> Table:
    """Make the attention a table for 80 columns: of all owners, or of those who helped most."""
    title, first = "Attention: who learned, by row; who helped, by column", "learned"
    if len(matrix.owners) <= _WIDEST:
        rows = zip(matrix.learners, matrix.alpha, strict=True)
        body = [[_name(learner), *_cells(row, _bold)] for learner, row in rows]
        return _table(title, [first, *map(_name, matrix.owners)], body)
    body = []
    for learner, row in zip(matrix.learners, matrix.alpha, strict=True):
        best = [k for k in np.argsort(-row, kind="stable") if not np.isnan(row[k])][:_HELPERS]
        cells = [f"{_name(matrix.owners[k])} {row[k]:+.2f}" for k in best]
        body.append([_name(learner), _bold(cells[0]), *cells[1:], *[""] * (_HELPERS - len(cells))])
    title = f"Attention: who helped most, of {len(matrix.owners)}; all are in {REPORT}"
    return _table(title, [first, *(str(i + 1) for i in range(_HELPERS))], body)


def _markdown(
    config: Mapping[str, Any],
    panels: Sequence[tuple[str, list[str], list[list[str]]]],
    matrix: Attention,
) -> str:
    names = ("method", "scenario", "data", "model", "clients", "num-server-rounds", "local-epochs", "seed")
    told = ", ".join(f"{name} {config[name]}" for name in names if config.get(name) not in (None, ""))
    lines = ["# Continual run", "", " ".join(told.split())]
    for title, head, body in panels:
        lines += ["", f"## {title}", "", *_rows(head, body)]
    if panels:
        lines += ["", LEGEND]
    if matrix.learners:
        body = [
            [_name(learner), *_cells(row, "**{}**".format)]
            for learner, row in zip(matrix.learners, matrix.alpha, strict=True)
        ]
        lines += ["", "## Attention", "", *_rows(["learned", *map(_name, matrix.owners)], body)]
        lines += ["", f"Rows: who learned. Columns: who helped. c: client, t: task. The picture: {PICTURE}."]
    return "\n".join([*lines, ""])


def _rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, *body)]
    return [rows[0], "|---|" + "---:|" * (len(head) - 1), *rows[1:]]


def draw(matrix: Attention, path: Path) -> None:
    """Draw the attention as a heat map, a PNG; places without a report are grey.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    # The object API: no pyplot, so no global state and no display.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    high, wide = matrix.alpha.shape
    figure = Figure(figsize=(min(2.5 + 0.5 * wide, 20), min(1.8 + 0.35 * high, 20)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    most = max(float(np.nanmax(np.abs(matrix.alpha))), 1e-9)
    cells = np.ma.masked_invalid(matrix.alpha)
    image = axes.imshow(cells, cmap=colormaps["RdBu_r"], vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(wide), [_name(owner) for owner in matrix.owners], rotation=90)
    axes.set_yticks(range(high), [_name(learner) for learner in matrix.learners])
    axes.set(xlabel="who helped (client, task)", ylabel="who learned")
    if matrix.alpha.size <= 400:
        for (i, j), alpha in np.ndenumerate(matrix.alpha):
            if not np.isnan(alpha):
                colour = "white" if abs(alpha) > 0.6 * most else "black"
                axes.text(j, i, f"{alpha:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="alpha, mean over weight tensors")
    figure.savefig(path, dpi=150, format="png")
