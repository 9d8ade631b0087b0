"""A run's folder: who may write it, what it was told, what happened round by round, where it can resume."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import load_state, save_state, write_atomic
from .disk import append

S = TypeVar("S")

CONFIG, METRICS, CHECKPOINT = "config.json", "metrics.jsonl", "checkpoint.safetensors"
MASK, CURVE, LOCK, TOKEN = "mask.fedmask", "curve.png", ".lock", ".run"
FAILED = "failed.txt"  # why the server gave the run up; a new start removes it
log = logging.getLogger(__name__)
_TIMEOUTS = ("node-timeout", "round-timeout", "max-silent-rounds")
_OPERATIONS = ("metrics-port", "metrics-address", "log-format", "server-threads")
WHERE_NOT_WHAT = frozenset({"out", "data-dir", "memory-dir", *_TIMEOUTS, *_OPERATIONS})


class RunDirError(RuntimeError):
    """The folder belongs to another run; the message names the fix."""


class RunDir:
    """The folder of one run, held exclusively by one server process.

    Parameters
    ----------
    path
        The folder; made when missing.
    config
        The flat run config. A folder that holds a complete round of another one is refused, except for settings
        that say where a run happens rather than what it computes.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunDirError(f"another process is writing {path}: wait for it, or use another folder") from error
        self._pending = ""
        told = json.loads(json.dumps(dict(config)))
        written = path / CONFIG
        if (path / CHECKPOINT).exists() and written.exists():  # one that never finished a round binds nobody
            try:
                same_run(path, json.loads(written.read_text()), told)
            except ValueError as error:
                self._lock.close()
                raise RunDirError(f"{written} is damaged ({error}): use another folder, or --overwrite") from error
            except RunDirError:
                self._lock.close()
                raise
        write_atomic(written, (json.dumps(told, indent=2, sort_keys=True) + "\n").encode())
        (path / FAILED).unlink(missing_ok=True)

    def fail(self, reason: str) -> None:
        """Note why the run is given up, for whoever looks at the folder."""
        with contextlib.suppress(OSError):  # a full disk may be why
            write_atomic(self.path / FAILED, f"{reason}\n".encode())

    def token(self) -> str:
        """16 hex digits drawn when the run first starts, the same whenever it is resumed."""
        if not (found := read_token(self.path)):
            found = secrets.token_hex(8)
            write_atomic(self.path / TOKEN, found.encode())
        return found

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def restore(self, cls: type[S]) -> tuple[S, dict[str, Any]] | None:
        """State and meta (with "round") of the last complete round, or None; later metrics lines are dropped."""
        path = self.path / CHECKPOINT
        found = load_state(path, cls) if path.exists() else None
        last = int(found[1]["round"]) if found else 0
        lines = [line for line in self.metrics() if line["round"] <= last]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomic(self.path / METRICS, text.encode())
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """Every whole line of the metrics file; one that a crash cut off or damaged is left out."""
        return read_lines(self.path / METRICS)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append one round to the metrics file.

        Raises
        ------
        OSError
            When the disk refuses; the line is kept and written with the next one.
        """
        self._pending += json.dumps(dict(line)) + "\n"
        self._flush()

    def _flush(self) -> None:
        append(self.path / METRICS, self._pending.encode())
        self._pending = ""

    def save(self, state: Any, meta: Mapping[str, Any]) -> None:
        """Checkpoint the state after a complete round."""
        save_state(self.path / CHECKPOINT, state, meta)

    def finish(self, frame: bytes) -> None:
        """Write the final mask and the curve of accuracy against bytes."""
        self._flush()
        write_atomic(self.path / MASK, frame)
        from .show import plot_curve

        try:
            plot_curve(self.metrics(), self.path / CURVE)
        except ImportError:
            log.warning("no %s without matplotlib: pip install 'fedmask-flwr[sim]'", CURVE)


def read_token(path: Path) -> str:
    """What names the run in that folder, "" before its first start."""
    file = path / TOKEN
    return file.read_text("ascii", "replace").strip() if file.exists() else ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file, or nothing when there is none."""
    lines = path.read_text("utf-8", "replace").split("\n")[:-1] if path.exists() else []
    return [found for line in lines if (found := _parsed(line)) is not None]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("round"), int) else None


def standing(path: Path, told: Mapping[str, Any]) -> tuple[int, bool]:
    """Give the last recorded round of the run in a folder, and whether that run is complete.

    Raises
    ------
    RunDirError
        The folder holds a complete round of a run with other settings, or its config is damaged.
    """
    written = path / CONFIG
    if not written.exists() or not (path / CHECKPOINT).exists():
        return 0, False
    try:
        same_run(path, json.loads(written.read_text("utf-8")), json.loads(json.dumps(dict(told))))
    except ValueError as error:
        raise RunDirError(f"{written} is damaged ({error}): use another folder, or --overwrite") from error
    last = max((line["round"] for line in read_lines(path / METRICS)), default=0)
    return last, last >= int(told["num-server-rounds"]) and (path / MASK).exists()


def where_not_what(config: Mapping[str, Any]) -> frozenset[str]:
    """Keys of a run config that say where it happens; a folder is also what, where it alone names the data."""
    data = str(config.get("data", ""))
    return WHERE_NOT_WHAT - {"data-dir"} if data == "npz" or ":" in data else WHERE_NOT_WHAT


def same_run(path: Path, written: dict[str, Any], told: dict[str, Any]) -> None:
    """Raise ``RunDirError`` when two run configs compute different things, naming the keys."""
    from .config import relevant  # a glance at a run pays for no pydantic

    before, now = relevant(written), relevant(told)
    keys = sorted((set(before) | set(now)) - where_not_what(written) - where_not_what(told))
    other = [f"{k}: {before.get(k)!r} then, {now.get(k)!r} now" for k in keys if before.get(k) != now.get(k)]
    if other:
        raise RunDirError(
            f"{path} holds a run with other settings ({'; '.join(other)}): use another folder, or --overwrite"
        )
