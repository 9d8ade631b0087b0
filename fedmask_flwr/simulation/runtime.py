"""Run the Flower app in Flower's Simulation Runtime, hermetically, and leave nothing behind.

`flwr run` submits and returns: it exits 0 when the run fails, and the SuperLink it starts lives on with the
environment and the code of whoever came first. Here every run has its own SuperLink, FLWR_HOME, port and Ray
session in one temporary folder, and a watchdog (`reaper`) that ends all of it.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmask_flwr.simulation.sandbox import Interrupted, Sandbox, sandbox, scripts, stop_signals
from fedmask_flwr.simulation.stage import Scalar, stage, toml_lines

__all__ = ["LOG", "Interrupted", "SimulationError", "run"]

LOG = "flower.log"
_START_S = 60.0
_TICK_S = 0.3
_POLL_S = 30.0
_LOG_LINES = 25
_SUPERLINK = b"\n--- SuperLink ---\n"
_MAX_REFUSED = 3


class SimulationError(RuntimeError):
    """The run did not complete; the message holds Flower's reason and the end of its log."""


def run(
    config: Mapping[str, Scalar],
    *,
    num_clients: int,
    out: Path,
    on_round: Callable[[dict[str, Any]], None],
    runs: Sequence[str] = (),
    cpus_per_client: int = 1,
    gpus_per_client: float = 0,
    log_path: Path | None = None,
    root: Path | None = None,
) -> None:
    """Run the app with `num_clients` simulated clients until it completes.

    Parameters
    ----------
    config : mapping
        Run-config keys to override; the others keep the app's defaults. ``out`` is set here.
    num_clients : int
        Simulated SuperNodes.
    out : Path
        Folder the ServerApp writes to; made where missing.
    on_round : callable
        Called in this thread with each new line of ``out/metrics.jsonl``, as a dict.
    runs : sequence of str
        Folders below ``out`` that the app writes a run to, each; then their lines are passed on instead, with the
        folder as "run".
    cpus_per_client, gpus_per_client : int, float
        What one client task reserves in Ray, so how many run at once.
    log_path : Path, optional
        Where Flower's log goes; ``out/flower.log`` when not given.
    root : Path, optional
        An app folder to stage instead of this package's own.

    Raises
    ------
    SimulationError
        Flower did not start, refused the run, or the run failed or was stopped.
    Interrupted
        SIGTERM or SIGHUP came (main thread only). KeyboardInterrupt passes through. Both after cleaning up.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = log_path or out / LOG
    for name in ("flwr", "flower-superlink", "flower-superexec"):
        if not (scripts() / name).exists():
            raise SimulationError(f"no {name} beside {sys.executable}; pip install 'fedmask-flwr[sim]' there")
    sizes = (
        f"num-supernodes={num_clients} client-resources-num-cpus={cpus_per_client} "
        f"client-resources-num-gpus={gpus_per_client}"
    )
    feed = _Feed(out, runs)
    threads = str(cpus_per_client)
    with stop_signals(), sandbox(threads, _extra_path(config)) as place:
        try:
            run_id, superlink = _submit(place, {**config, "out": str(out)}, sizes, root)
            status, details = _follow(place, superlink, run_id, log, feed, on_round)
        finally:
            with log.open("ab") as f, contextlib.suppress(OSError):
                f.write(_SUPERLINK + (place.folder / "superlink.log").read_bytes())
    if status != "finished:completed":
        raise SimulationError("\n".join([f"Flower says {status}: {details}", *_log_end(log), f"Full log: {log}"]))


def _submit(
    place: Sandbox, config: Mapping[str, Scalar], sizes: str, root: Path | None
) -> tuple[str, subprocess.Popen[bytes]]:
    app, toml = place.folder / "app", place.folder / "run.toml"
    stage(app, root, config)
    toml.write_text(toml_lines(config), encoding="utf-8")
    superlink = _start_superlink(place)
    started = _flwr(place, "run", str(app), "sim", "--federation-config", sizes, "--run-config", str(toml))
    run_id = str(started.get("run-id") or "")
    if not run_id:
        reason = str(started.get("error-message", started)).splitlines()
        reason = [line for line in reason if line.strip() and not line.startswith("Using SuperLink")]
        raise SimulationError("\n".join(["Flower refused the run:", *reason]))
    return run_id, superlink


def _follow(
    place: Sandbox,
    superlink: subprocess.Popen[bytes],
    run_id: str,
    log: Path,
    feed: _Feed,
    on_round: Callable[[dict[str, Any]], None],
) -> tuple[str, str]:
    """Pass rounds on until the run has ended; give its status and details."""
    # Asking for the status costs a second of CPU (a fresh `flwr`), but the log stream ends when the run does.
    stream, next_poll, refused = _stream(place, run_id, log), time.monotonic() + _POLL_S, 0
    while True:
        for row in feed.new():
            on_round(row)
        if superlink.poll() is not None:
            return "nothing", f"the SuperLink ended by itself with exit code {superlink.returncode}"
        if stream.poll() is not None or time.monotonic() > next_poll:
            rows = _flwr(place, "list", "sim", "--run-id", run_id).get("runs") or []
            refused = 0 if rows else refused + 1
            if refused == _MAX_REFUSED:
                return "nothing", "the SuperLink does not answer"
            status = str(rows[0].get("status")) if rows else "unknown"
            if status.startswith("finished:"):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    stream.wait(_POLL_S)
                for row in feed.new():
                    on_round(row)
                return status, str(rows[0].get("status-details") or "no details")
            if stream.poll() is not None:
                stream = _stream(place, run_id, log)
            next_poll = time.monotonic() + _POLL_S
        time.sleep(_TICK_S)


def _stream(place: Sandbox, run_id: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as sink:  # a stream always starts with the first line
        return place.spawn([str(scripts() / "flwr"), "log", run_id, "sim", "--stream"], sink)


def _start_superlink(place: Sandbox) -> subprocess.Popen[bytes]:
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            str(scripts() / "flower-superlink"),
            "--simulation",
            "--insecure",
            "--isolation",
            "subprocess",
        ]
        with (place.folder / "superlink.log").open("wb") as sink:
            child = place.spawn([*command, "--host", "127.0.0.1", "--port", str(port)], sink)
        if _healthy(child, port):
            lines = "[superlink]", 'default = "sim"', "[superlink.sim]", f'address = "127.0.0.1:{port}"'
            (place.folder / "home" / "config.toml").write_text("\n".join([*lines, "insecure = true", ""]))
            return child
        if child.poll() is None:
            child.kill()
        child.wait()
    raise SimulationError("\n".join(["the SuperLink did not start", *_log_end(place.folder / "superlink.log")]))


class _Feed:
    """Follow one run, or several below its folder."""

    def __init__(self, out: Path, runs: Sequence[str]) -> None:
        self.parts = {run: _Metrics(out / run / "metrics.jsonl") for run in runs or ("",)}

    def new(self) -> list[dict[str, Any]]:
        """List the rounds written since the last call."""
        rows = [(run, row) for run, part in self.parts.items() for row in part.new()]
        return [{**row, "run": run} if run else row for run, row in rows]


class _Metrics:
    """Follow a JSON-lines file that may be appended to, cut back or replaced between looks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[int, str] = {}
        self.stamp: tuple[int, int, int] | None = None
        for _ in self.new():
            pass

    def new(self) -> list[dict[str, Any]]:
        """List the rounds written since the last call."""
        try:
            at = self.path.stat()
            stamp = (at.st_ino, at.st_size, at.st_mtime_ns)
            if stamp == self.stamp:
                return []
            text = self.path.read_text("utf-8")
        except OSError:
            return []
        self.stamp = stamp
        rows = []
        for line in text.splitlines(keepends=True):
            if not line.endswith("\n"):
                break  # still being written
            try:
                row = json.loads(line)
                number = int(row["round"])
            except (ValueError, KeyError, TypeError):
                continue
            if self.seen.get(number) != line:
                self.seen[number] = line
                rows.append(row)
        return rows


def _extra_path(config: Mapping[str, Scalar]) -> str:
    """Give the current folder where a ``module:function`` of the config lives in it, else nothing."""
    here = Path.cwd()
    texts = [v for v in config.values() if isinstance(v, str)]
    # Alone, or one of the methods of a comparison.
    tops = [
        top for v in texts for top in re.findall(r"(?:^|,)\s*([A-Za-z_]\w*)[\w.]*:[A-Za-z_]\w*\s*(?=[(,]|$)", v)
    ]
    return str(here) if any((here / top).is_dir() or (here / f"{top}.py").is_file() for top in tops) else ""


def _healthy(child: subprocess.Popen[bytes], port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_S
    while child.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=2):
                # Another process may have taken the port first; then ours is about to end.
                time.sleep(_TICK_S)
                return child.poll() is None
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def _flwr(place: Sandbox, *args: str) -> dict[str, Any]:
    done = subprocess.run(  # noqa: S603
        [str(scripts() / "flwr"), *args, "--format", "json"],
        cwd=place.folder / "cwd",
        env=place.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    # Warnings may come before the object.
    at = done.stdout.find("{")
    with contextlib.suppress(ValueError):
        got = json.loads(done.stdout[at:]) if at >= 0 else None
        if isinstance(got, dict):
            return got
    raise SimulationError(f"flwr {args[0]} failed: {(done.stdout + done.stderr).strip() or done.returncode}")


def _log_end(log: Path) -> list[str]:
    """Give the last lines that say something: no HTTP access log."""
    raw = log.read_bytes() if log.exists() else b""
    text = re.sub(r"\x1b\[[0-9;]*m", "", raw.partition(_SUPERLINK)[0].decode("utf-8", "replace"))
    lines = [line for line in text.splitlines() if line.strip() and "[uvicorn.access]" not in line]
    return lines[-_LOG_LINES:]
