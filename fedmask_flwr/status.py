"""``fedmask status``: print where a run, or each run of a comparison, stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from .show import human_bytes
from .standing import INDEX, WELL, NoRunError, Status, comparison, span, stand

__all__ = ["NoRunError", "report"]

_STYLES = {"waiting": "cyan", "running": "cyan", "finished": "green"}
_ACCURACIES = {
    "accuracy_sampled": "sampled",
    "accuracy_threshold": "threshold",
    "accuracy_expected": "expected",
    "client_accuracy_mean": "clients",
    "client_accuracy_worst_decile": "worst 10%",
}


def report(folder: Path, console: Console, *, as_json: bool = False, stall: float | None = None) -> int:
    """Print where a run, or each of a comparison, stands; 0 when it runs or is finished, 1 when it does not go on.

    Raises
    ------
    NoRunError
        There is none.
    """
    many = (folder / INDEX).exists()
    runs = comparison(folder, stall=stall) if many else [stand(folder, stall=stall)]
    if as_json:
        told: Any = {"folder": str(folder), "runs": [asdict(run) for run in runs]} if many else asdict(runs[0])
        console.print(json.dumps(told, indent=1), soft_wrap=True, markup=False, highlight=False, emoji=False)
    else:
        for line in map(_brief, runs) if many else _lines(runs[0]):
            console.print(line, soft_wrap=True)
    return int(any(run.state not in WELL for run in runs))


def _brief(run: Status) -> Text:
    state = (run.state, _STYLES.get(run.state, "bold red"))
    total = f"round {run.round} of {run.rounds}" if run.rounds else ""
    accuracy = _accuracy(run.figures)
    sent = human_bytes(sum(run.bytes.values())) if run.round else ""
    lost = f"{run.failures.clients} failed replies" if run.failures.clients else ""
    parts = [total, accuracy, sent, lost, f"{span(run.left)} left" if run.left else "", run.reason]
    return Text.assemble(f"{Path(run.folder).name}: ", state, *(f", {part}" for part in parts if part))


def _lines(run: Status) -> list[Text]:
    head = Text.assemble((run.state, _STYLES.get(run.state, "bold red")), f", round {run.round} of {run.rounds}")
    if run.round:
        head.append(f", {span(run.age)} ago")
    pace = [] if run.rounds_per_hour is None else [f"{run.rounds_per_hour:.4g} rounds an hour"]
    pace += [] if run.left is None else [f"about {span(run.left)} left"]
    sent, lost = run.bytes, run.failures
    at = run.checkpoint_round
    rows = {
        "": run.reason,
        "pace": ", ".join(pace),
        "accuracy": _accuracy(run.figures),
        "loss": ", ".join(f"{k} {v:.4g}" for k, v in run.figures.items() if "loss" in k),
        "bytes": f"{human_bytes(sent['uplink_bytes'])} up, {human_bytes(sent['downlink_bytes'])} down, "
        f"{human_bytes(sent['evaluate_bytes'])} to evaluate; Flower's own "
        f"{human_bytes(sent['flower_uplink_bytes'] + sent['flower_downlink_bytes'])}",
        "failures": f"{lost.clients} replies and {lost.evaluations} evaluations in {lost.rounds} of {run.round} "
        "rounds" + (f", last in round {lost.last}" if lost.rounds else ""),
        "checkpoint": "none" if at is None else f"round {at}, {span(run.checkpoint_age or 0)} ago",
        "disk": f"{human_bytes(run.disk_free)} free",
        "told": ", ".join(f"{key} {value}" for key, value in run.told.items()),
    }
    return [head, *(Text(f"{name:<10}  {text}" if name else text) for name, text in rows.items() if text)]


def _accuracy(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{word} {figures[name]:.4f}" for name, word in _ACCURACIES.items() if name in figures)
