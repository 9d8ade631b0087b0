"""What a continual run came to: losses at each task's end, what was forgotten, and who helped whom.

``fedmask report FOLDER`` prints it and writes ``report.md`` and ``attention.png``. alpha of (client, task) for
(owner client, owner task) is what the first gives the second's task-adaptive parameters, mean over weight tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import track
from .checkpoint import write_atomic

__all__ = ["Attention", "ReportError", "attention", "draw", "forgetting", "latest", "show", "task_ends"]

REPORT, PICTURE = "report.md", "attention.png"
LOSSES = (
    ("new", "client_loss_new"),
    ("base", "client_loss_base"),
    ("average", "client_loss"),
    ("mixture", "client_loss_mixture"),
    ("latest", "client_loss_latest"),
)
ACCURACIES = (
    ("new", "client_accuracy_new"),
    ("base", "client_accuracy_base"),
    ("average", "client_accuracy"),
)
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

Line = Mapping[str, Any]
Entry = tuple[int, int]


class ReportError(RuntimeError):
    """A folder holds no continual run, or a damaged one; the message says which."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Who helped whom: ``alpha`` (learners, owners), signed; NaN where a learner reported none.

    A learner or an owner is a (client, task), both from 0, in ascending order.
    """

    learners: tuple[Entry, ...]
    owners: tuple[Entry, ...]
    alpha: npt.NDArray[np.float64]


def attention(rows: Iterable[Sequence[Any]]) -> Attention:
    """Make a matrix of rows (client, task, owner client, owner task, alpha); of two for one place the later counts.

    Raises
    ------
    ValueError
        A row is none.
    """
    found: dict[tuple[Entry, Entry], float] = {}
    for row in rows:
        if not isinstance(row, list | tuple) or len(row) != 5 or not all(map(_is_count, row[:4])):
            raise ValueError(f"{row!r} is no row (client, task, owner client, owner task, alpha)")
        if (alpha := _number(row[4])) is None:
            raise ValueError(f"alpha of {row!r} is no finite number")
        found[(row[0], row[1]), (row[2], row[3])] = alpha
    learners = tuple(sorted({learner for learner, _ in found}))
    owners = tuple(sorted({owner for _, owner in found}))
    matrix = np.full((len(learners), len(owners)), np.nan)
    for (learner, owner), alpha in found.items():
        matrix[learners.index(learner), owners.index(owner)] = alpha
    return Attention(learners, owners, matrix)


def latest(lines: Iterable[Line]) -> list[Sequence[Any]]:
    """Rows of each (client, task)'s last report; an owner that it no longer names is gone.

    Raises
    ------
    ValueError
        A line's attention is no list of rows.
    """
    reports: dict[Entry, list[Sequence[Any]]] = {}
    for line in lines:
        rows = line.get("attention") or []
        if not isinstance(rows, list):
            raise ValueError(f"attention of round {line.get('round')} is no list")
        attention(rows)
        fresh: dict[Entry, list[Sequence[Any]]] = {}
        for row in rows:
            fresh.setdefault((row[0], row[1]), []).append(row)
        reports |= fresh
    return [row for rows in reports.values() for row in rows]


def forgetting(lines: Sequence[Line], tasks: int | None = None) -> dict[str, float]:
    """How much worse the earlier tasks are at the last evaluation than at their best before; what is known of it.

    "loss": mean over j < tasks - 1 of (last L_j - least earlier L_j), nats. "accuracy": of (greatest earlier a_j -
    last a_j). Below 0: they became better. ``tasks`` have been met; None: as many as the lines have figures of. A
    task that was never evaluated before is left out of the mean.
    """
    tasks = _tasks(lines) if tasks is None else tasks
    found = {}
    for kind, sign in (("loss", 1), ("accuracy", -1)):
        names = [f"client_{kind}_task_{j}" for j in range(tasks - 1)]
        # The last line that evaluates any of them, so that one task's lack does not bring up an older figure.
        at = max((i for i, line in enumerate(lines) for n in names if _number(line.get(n)) is not None), default=0)
        worse = []
        for name in names:
            before = [sign * v for line in lines[:at] if (v := _number(line.get(name))) is not None]
            last = _number(lines[at].get(name)) if lines else None
            if before and last is not None:
                worse.append(sign * last - min(before))
        if worse:
            found[kind] = sum(worse) / len(worse)
    return found


def task_ends(lines: Sequence[Line], tasks: int, rounds: int) -> list[tuple[int, int]]:
    """(task, index of a line): the last evaluation in each task's rounds; a task without one is left out.

    ``rounds`` is the whole run's; each task has an equal share of them.
    """
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        if any(_number(line.get(key)) is not None for _, key in (*LOSSES, *ACCURACIES)) or _tasks([line]):
            ends[min(tasks - 1, (int(line["round"]) - 1) * tasks // rounds)] = i
    return sorted(ends.items())


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _tasks(lines: Iterable[Line]) -> int:
    """1 + the greatest task that a line has a figure of; 0: none."""
    heads = ("client_loss_task_", "client_accuracy_task_")
    tails = [key.removeprefix(head) for line in lines for key in line for head in heads if key.startswith(head)]
    return 1 + max((int(tail) for tail in tails if tail.isascii() and tail.isdigit()), default=-1)


# A folder's report


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
    from .config import ConfigError
    from .data.scenario import scenario

    try:
        return scenario(str(config.get("scenario") or "")).tasks
    except ConfigError:
        return 0


def _panels(config: Mapping[str, Any], lines: Sequence[Line]) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, head, rows) of each table of tasks; columns that no row has are left out."""
    tasks = max(_tasks(lines), _scenario_tasks(config))
    if not tasks:
        return []
    rounds = config.get("num-server-rounds")
    if not _is_count(rounds) or not rounds:
        raise ReportError(f"num-server-rounds in {track.CONFIG} is {rounds!r}, not a number of rounds")
    ends = task_ends(lines, tasks, rounds)
    found = []
    for kind, title, columns, form in PANELS:
        here = [
            (name, key) for name, key in columns if any(_number(lines[i].get(key)) is not None for _, i in ends)
        ]
        lost = [forgetting(lines[: i + 1], task + 1).get(kind) for task, i in ends]
        if not here and not any(value is not None for value in lost):
            continue
        body = []
        for (task, i), forgot in zip(ends, lost, strict=True):
            values = [*(_number(lines[i].get(key)) for _, key in here), forgot]
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
