"""What the runs of a comparison came to: the index of its folder, each run's figures, means over seeds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fedmask_flwr import track
from fedmask_flwr.checkpoint import write_atomic

from .lineup import Run

__all__ = [
    "FIGURES",
    "INDEX",
    "CompareError",
    "Result",
    "enrol",
    "figures",
    "fits",
    "folders",
    "mark",
    "over_seeds",
    "read",
    "shared",
]

INDEX = "runs.json"
FIGURES = (
    "accuracy_sampled",
    "accuracy_threshold",
    "accuracy_expected",
    "client_accuracy_mean",
    "client_accuracy_std",
    "client_accuracy_worst_decile",
    "client_accuracy_worst",
    "uplink_bytes",
    "downlink_bytes",
    "evaluate_bytes",
    "uplink_bpp",
    "client_model_bits",
    "seconds",
    "clients_failed",
    "evaluations_failed",
)
_TOTALS = frozenset({"uplink_bytes", "downlink_bytes", "evaluate_bytes", "clients_failed", "evaluations_failed"})
_OVER_ROUNDS = _TOTALS | {"uplink_bpp", "seconds"}


class CompareError(RuntimeError):
    """A comparison's folder cannot be used, or some of its runs failed; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run in a comparison's folder: its lines of metrics, whether it is complete, why it failed (or "")."""

    label: str
    method: str
    settings: dict[str, Any]
    seed: int
    folder: str
    error: str
    complete: bool
    config: dict[str, Any]
    rows: list[dict[str, Any]]


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Sum one run up; what no line says is left out.

    Bytes and failures are totals over rounds and clients; bits a parameter are a mean over the rounds in which a
    client answered, seconds a median (the first round of a simulation waits for its nodes); accuracies and the bits
    of a device's network are the last round's.
    """
    found: dict[str, float] = {}
    for name in FIGURES:
        answered = [row for row in rows if name != "uplink_bpp" or row.get("clients_ok")]
        values = [float(row[name]) for row in answered if row.get(name) is not None]
        if name in _TOTALS and values:
            found[name] = sum(values)
        elif name == "uplink_bpp" and values:
            found[name] = sum(values) / len(values)
        elif name == "seconds" and values:
            found[name] = median(values)
        elif name not in _OVER_ROUNDS and rows and rows[-1].get(name) is not None:
            found[name] = float(rows[-1][name])
    return found


def over_seeds(runs: Iterable[Mapping[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Mean, least and greatest of each figure over runs; a figure that some run lacks is left out."""
    runs = list(runs)
    names = [name for name in FIGURES if runs and all(name in run for run in runs)]
    columns = {name: [run[name] for run in runs] for name in names}
    return {name: (sum(v) / len(v), min(v), max(v)) for name, v in columns.items()}


def read(out: Path, *, alike: bool = True) -> list[Result]:
    """Read every run of a comparison's folder, in the order of its index; ``alike`` checks that they compare.

    Raises
    ------
    CompareError
        When there is no comparison, its index is damaged, or its runs differ in more than was written for each.
    """
    results = [_read_run(out, entry) for entry in _index(out)]
    if alike:
        shared(results)
    return results


def shared(results: Sequence[Result], planned: Sequence[Run] = ()) -> dict[str, Any]:
    """Give the settings that are equal in all runs that have a round, and in those planned.

    Raises
    ------
    CompareError
        A setting differs between two runs without being either's own: they cannot be compared.
    """
    common: dict[str, Any] = {}
    known = [(result.label, result.settings, result.config) for result in results if result.rows]
    for label, own, config in [*known, *((run.label, run.settings, run.config) for run in planned)]:
        for key in sorted(set(config) - set(own) - track.where_not_what(config) - {"method", "seed"}):
            if common.setdefault(key, config[key]) != config[key]:
                raise CompareError(
                    f"{label} has {key} = {config[key]!r}, others {common[key]!r}: runs that differ in more than "
                    "their method, its settings and the seed are no comparison; use another folder, or --overwrite"
                )
    return common


def fits(out: Path, runs: Sequence[Run]) -> None:
    """Check that runs can be added to a folder.

    Raises
    ------
    CompareError
        When it holds runs that these cannot be compared with.
    """
    ours = {run.folder for run in runs}
    before = read(out, alike=False) if (out / INDEX).exists() else []
    shared([other for other in before if other.folder not in ours], runs)


def folders(out: Path) -> list[Path]:
    """Give the folders of a comparison's runs, as well as they can be told when its index is damaged."""
    try:
        return [out / entry["folder"] for entry in _index(out)] if (out / INDEX).exists() else []
    except CompareError:
        return [path.parent for path in sorted(out.glob(f"*-s*/{track.CONFIG}"))]


def enrol(out: Path, runs: Sequence[Run]) -> None:
    """Add runs to the index of a folder, and forget that any of them failed.

    Raises
    ------
    CompareError
        As ``fits``.
    """
    fits(out, runs)
    before = _index(out) if (out / INDEX).exists() else []
    entries = {entry["folder"]: entry for entry in before} | {run.folder: _entry(run) for run in runs}
    out.mkdir(parents=True, exist_ok=True)
    _write(out, list(entries.values()))


def mark(out: Path, folder: str, error: str) -> None:
    """Note why a run failed."""
    _write(out, [{**entry, "error": error} if entry["folder"] == folder else entry for entry in _index(out)])


def _entry(run: Run) -> dict[str, Any]:
    names = ("label", "method", "settings", "seed", "folder")
    return {**{name: getattr(run, name) for name in names}, "error": ""}


def _write(out: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    write_atomic(out / INDEX, (json.dumps({"runs": list(entries)}, indent=1) + "\n").encode())


def _index(out: Path) -> list[dict[str, Any]]:
    path = out / INDEX
    try:
        entries = json.loads(path.read_text("utf-8"))["runs"]
        for entry in entries:
            plain = Path(entry["folder"]).name == entry["folder"] != ".." and entry["folder"]
            if not plain or not isinstance(entry["settings"], dict):
                raise ValueError(f"run {entry['folder']!r}")
            for name, kind in (("label", str), ("method", str), ("seed", int), ("error", str)):
                if not isinstance(entry[name], kind):
                    raise TypeError(f"{name} of {entry['folder']}")
    except FileNotFoundError as error:
        raise CompareError(f"{out} holds no comparison (there is no {INDEX}): run `fedmask compare`") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CompareError(f"{path} is damaged ({error}): use another folder, or --overwrite") from error
    return list(entries)


def _read_run(out: Path, entry: Mapping[str, Any]) -> Result:
    folder = out / entry["folder"]
    try:
        config = dict(json.loads((folder / track.CONFIG).read_text("utf-8")))
        complete = track.standing(folder, config)[1]
    except FileNotFoundError:
        config, complete = {}, False
    except (ValueError, KeyError, TypeError, track.RunDirError) as error:
        raise CompareError(f"{folder / track.CONFIG} is damaged ({error}): delete {folder}") from error
    try:
        rows = track.read_lines(folder / track.METRICS)
    except OSError as error:
        raise CompareError(f"{folder / track.METRICS} cannot be read ({error})") from error
    return Result(
        **{k: entry[k] for k in ("label", "method", "settings", "seed", "folder", "error")},
        complete=complete,
        config=config,
        rows=rows,
    )
