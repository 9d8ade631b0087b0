"""Where a run stands, told from its folder alone, which is read and never touched."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from . import locks, track

__all__ = ["INDEX", "WELL", "Failures", "NoRunError", "Status", "comparison", "span", "stand"]

State = Literal["waiting", "running", "finished", "stalled", "stopped", "failed"]
INDEX = "runs.json"
WELL = frozenset({"waiting", "running", "finished"})
PATIENCE = 120.0  # seconds without a round before a run may be called stalled; or 5 median rounds
REASON = 500  # characters of why a run was given up
RECENT = 20  # rounds that the pace is taken from
_TOLD = ("method", "data", "scenario", "model", "weights", "partition", "seed", "clients")
_WAYS = ("uplink_bytes", "downlink_bytes", "evaluate_bytes", "flower_uplink_bytes", "flower_downlink_bytes")


class NoRunError(RuntimeError):
    """There is no run to look at; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Failures:
    """Replies that were lost, in training and in evaluation, and in how many rounds; ``last`` is such a round."""

    clients: int
    evaluations: int
    rounds: int
    last: int


@dataclass(frozen=True, slots=True)
class Status:
    """Where one run stands. Times in seconds, bytes over all clients and rounds so far; None: not known."""

    folder: str
    state: State
    reason: str
    round: int
    rounds: int
    held: bool | None
    age: float
    rounds_per_hour: float | None
    left: float | None
    figures: dict[str, float]
    bytes: dict[str, int]
    failures: Failures
    checkpoint_round: int | None
    checkpoint_age: float | None
    disk_free: int
    told: dict[str, Any]


def stand(folder: Path, *, stall: float | None = None, now: float | None = None, error: str = "") -> Status:
    """Say where the run in a folder stands.

    Parameters
    ----------
    folder : Path
    stall : float, optional
        Seconds without a round after which a run counts as stalled; None: 120, or 5 median rounds if more.
    now : float, optional
        Seconds since 1970.
    error : str
        Why a comparison gave the run up.

    Raises
    ------
    NoRunError
        The folder holds no run, or its config or metrics cannot be read.
    """
    now = time.time() if now is None else now
    config = _config(folder)
    try:
        rows = track.read_lines(folder / track.METRICS)
    except (OSError, ValueError) as failure:
        raise NoRunError(f"{folder / track.METRICS} cannot be read ({failure})") from failure
    rounds = int(config.get("num-server-rounds", 0))
    last = max((row["round"] for row in rows), default=0)
    paces = [pace for row in rows[-RECENT:] if (pace := _number(row.get("seconds"))) is not None]
    pace = median(paces[1:] or paces) if paces else None  # the first waits for nodes
    held = locks.held(folder / track.LOCK)
    age = _age(folder / (track.METRICS if rows else track.CONFIG), now)
    patience = stall if stall is not None else max(PATIENCE, 5 * (pace or 0.0))
    done = last >= rounds > 0
    state, reason = _state(folder, config, done=done, begun=bool(rows), held=held, age=age, patience=patience)
    if error and state != "finished":
        state, reason = "failed", error
    live = state == "running" and pace is not None
    at = _checkpoint(folder / track.CHECKPOINT)
    return Status(
        folder=str(folder),
        state=state,
        reason=reason,
        round=last,
        rounds=rounds,
        held=held,
        age=round(age, 1),
        rounds_per_hour=round(3600 / pace, 2) if pace else None,
        left=max(0.0, round((rounds - last) * pace - age, 1)) if live and pace is not None else None,
        figures=_figures(rows),
        bytes={way: _sum(rows, way) for way in _WAYS},
        failures=_failures(rows),
        checkpoint_round=at,
        checkpoint_age=None if at is None else round(_age(folder / track.CHECKPOINT, now), 1),
        disk_free=shutil.disk_usage(folder).free,
        told={key: config[key] for key in _TOLD if config.get(key) not in (None, "")},
    )


def _state(
    folder: Path,
    config: Mapping[str, Any],
    *,
    done: bool,
    begun: bool,
    held: bool | None,
    age: float,
    patience: float,
) -> tuple[State, str]:
    again = "start the same command again: it goes on after the last checkpoint"
    gone = held is False and (age > patience or locks.sees_all())
    if done and (folder / track.MASK).exists():
        return "finished", ""
    if held is not True and (failed := _failure(folder / track.FAILED)):
        return "failed", failed
    if gone or (done and held is None and age > patience):
        why = f"every round is there, {track.MASK} is not" if done else "no server holds the folder"
        return "stopped", f"{why}: see the server's log, free the disk, then {again}"
    ends = float(config.get("round-timeout", 0))
    if not begun and age <= max(float(config.get("node-timeout", 0)) + ends, patience):
        return "waiting", "no round yet: the server waits for nodes, or for the first round's replies"
    if age <= patience:
        return "running", ""
    end = f", and ends after round-timeout ({span(ends)}) at the latest" if ends > age else ""
    return "stalled", f"no round in {span(age)}: a node may have died, the round waits for its reply{end}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / track.CONFIG
    try:
        found = json.loads(path.read_text("utf-8"))
        numbers = ("num-server-rounds", "node-timeout", "round-timeout")
        if not isinstance(found, dict) or any(_number(found.get(k, 0)) is None for k in numbers):
            raise TypeError("no table of settings")
    except FileNotFoundError as error:
        raise NoRunError(
            f"{folder} holds no run (there is no {track.CONFIG}): name the folder of its --out"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise NoRunError(f"{path} is damaged ({error}): restore it, or start again with --overwrite") from error
    return found


def _age(path: Path, now: float) -> float:
    try:
        return max(0.0, now - path.stat().st_mtime)  # a clock that was set back
    except OSError:
        return 0.0


def _failure(path: Path) -> str:
    """Why the server gave up, "" when it did not."""
    try:
        return " ".join(path.read_text("utf-8", "replace").split())[:REASON]
    except OSError:
        return ""


def _checkpoint(path: Path) -> int | None:
    """Round of a checkpoint, or None when there is none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return int(json.loads((file.metadata() or {})["fedmask"])["meta"]["round"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The latest of each accuracy and loss; an evaluation need not be of the last round."""
    found: dict[str, float] = {}
    for row in rows:
        for name, value in row.items():
            wanted = name in ("loss", "train_loss") or "accuracy" in name
            if wanted and isinstance(value, int | float) and math.isfinite(value):
                found[name] = float(value)
    return found


def _failures(rows: Sequence[Mapping[str, Any]]) -> Failures:
    lost = [row for row in rows if row.get("clients_failed") or row.get("evaluations_failed")]
    return Failures(
        _sum(rows, "clients_failed"),
        _sum(rows, "evaluations_failed"),
        len(lost),
        max((row["round"] for row in lost), default=0),
    )


def _number(value: object) -> float | None:
    """A finite number, None for anything else that a damaged file may hold."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _sum(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return int(sum(_number(row.get(key)) or 0.0 for row in rows))


def comparison(folder: Path, *, stall: float | None = None, now: float | None = None) -> list[Status]:
    """Say where each run of a comparison stands, in the order of its index.

    Raises
    ------
    NoRunError
        The index is damaged.
    """
    try:
        entries = json.loads((folder / INDEX).read_text("utf-8"))["runs"]
        names = [(str(entry["folder"]), str(entry.get("error") or "")) for entry in entries]
        if wrong := [name for name, _ in names if not name or name in (".", "..") or Path(name).name != name]:
            raise ValueError(f"run {wrong[0]!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoRunError(f"{folder / INDEX} is damaged ({error}): start again with --overwrite") from error
    held = locks.held(folder / track.LOCK)
    return [_one(folder / name, error, stall, now, held) for name, error in names]


def _one(folder: Path, error: str, stall: float | None, now: float | None, held: bool | None) -> Status:
    try:
        return stand(folder, stall=stall, now=now, error=error)
    except NoRunError as failure:
        if not (folder / track.CONFIG).exists():
            state: State = "failed" if error else "stopped" if held is False else "waiting"
            reason = error or ("the comparison ended before it" if held is False else "not begun yet")
        else:
            state, reason = "failed", str(failure)
    none = Failures(0, 0, 0, 0)
    return Status(
        str(folder),
        state,
        reason,
        0,
        0,
        False,
        0.0,
        None,
        None,
        {},
        dict.fromkeys(_WAYS, 0),
        none,
        None,
        None,
        0,
        {},
    )


def span(seconds: float) -> str:
    """Write a time: 45 s, 12 min, 3.5 h, 2 days."""
    for most, unit, size in ((100, "s", 1), (100 * 60, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}" if size > 60 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
