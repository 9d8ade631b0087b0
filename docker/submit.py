"""Start the run that a TOML file describes, and wait until it has completed: the service ``run``.

A run that failed (its ServerApp was killed, say) is started again, up to ``FEDMASK_RETRIES`` times: it goes on
after the last round that its folder (``out``) holds. This program, started again, watches the run that it started
before. The ServerApp's log is passed on, here and to ``flower.log`` in that folder. Exit status 0: completed.

Environment: ``FEDMASK_RUN`` (the file), ``FEDMASK_CONTROL`` (host:port of the SuperLink's Control API),
``FEDMASK_CA`` (its CA certificate; without one: no TLS), ``FEDMASK_RETRIES``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

from fedmask_flwr.disk import append
from fedmask_flwr.simulation.stage import stage

POLL = 5.0  # seconds between tries
LOOK = 30.0  # seconds between looks at a run whose log still comes; each costs a second of CPU (a fresh `flwr`)
LAST_WORDS = 30.0  # seconds that the rest of a run's log may take
ROOM = 30.0  # seconds for somebody to free a disk, before each further try
LINK = "fedmask"
LOG = "flower.log"  # in the run's folder, as `fedmask run` does
STARTED = ".flower-run"  # in the run's folder: the id of the run that was started last
MASK = "mask.fedmask"  # in the run's folder: its result
MOST = 1 << 20  # bytes of the log that are kept for a disk that is full


def say(text: str) -> None:
    """Log one line."""
    print(text, flush=True)


def flwr(*args: str) -> dict[str, Any]:
    """What `flwr` answers as JSON; empty when it does not."""
    command = [str(Path(sys.executable).with_name("flwr")), *args, "--format", "json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603
    at = done.stdout.find("{")  # warnings may come before
    try:
        got = json.loads(done.stdout[at:]) if at >= 0 else {}
    except ValueError:
        got = {}
    if not got:
        say(f"flwr {args[0]}: {(done.stdout + done.stderr).strip() or done.returncode}")
    return got if isinstance(got, dict) else {}


def connect(control: str, ca: str) -> None:
    """Tell `flwr` where the SuperLink is."""
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    secure = f"root-certificates = {json.dumps(ca)}" if ca else "insecure = true"
    lines = "[superlink]", f'default = "{LINK}"', f"[superlink.{LINK}]", f"address = {json.dumps(control)}", secure
    home.joinpath("config.toml").write_text("\n".join([*lines, ""]), "utf-8")


def start(app: Path, file: Path, note: Path) -> str:
    """Start the run and note its id; "" when the SuperLink does not answer.

    Raises
    ------
    SystemExit
        It answered, and refused.
    """
    got = flwr("run", str(app), LINK, "--run-config", str(file))
    found = str(got.get("run-id") or "")
    if not found:
        reason = str(got.get("error-message", ""))
        if reason and not any(word in reason.lower() for word in ("connect", "unavailable", "timed out")):
            sys.exit(f"Flower refused the run: {reason}")
        return ""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found, "utf-8")
    except OSError as error:  # the run goes on; only this program, started again, would not know it
        say(f"{note} was not written ({error}): free the disk")
    say(f"run {found} started; its folder is {note.parent}")
    return found


def status_of(run: str) -> tuple[str, str]:
    """Status and details of a run: ("", "") when nobody answers, ("unknown", ...) when the SuperLink lost it."""
    got = flwr("list", LINK, "--run-id", run)
    if rows := got.get("runs"):
        return str(rows[0].get("status")), str(rows[0].get("status-details") or "")
    reason = str(got.get("error-message", ""))
    return ("unknown", reason) if "not found" in reason.lower() else ("", "")


def follow(run: str, log: Path, ended: threading.Event, silent: threading.Event) -> None:
    """Pass a run's log on until it has ended; ``silent`` is set whenever the stream breaks off."""
    command = [str(Path(sys.executable).with_name("flwr")), "log", run, LINK, "--stream"]
    seen, pending, full = 0, b"", False
    while True:
        last = ended.is_set()
        with subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as child:
            assert child.stdout is not None
            for number, line in enumerate(child.stdout):
                if number < seen:  # after a SuperLink's restart the stream begins at the start again
                    continue
                seen = number + 1
                print(line, end="", flush=True)
                pending = (pending + line.encode())[-MOST:]
                try:
                    append(log, pending)
                    pending, full = b"", False
                except OSError as error:
                    if not full:
                        say(f"{log} takes nothing ({error}): free the disk; the log is kept until then")
                    full = True
        if last:
            return
        silent.set()
        ended.wait(POLL)


def watch(run: str, log: Path) -> tuple[str, str]:
    """Wait until a run has ended; give its status and details."""
    ended, silent, shown = threading.Event(), threading.Event(), ""
    follower = threading.Thread(target=follow, args=(run, log, ended, silent), daemon=True)
    follower.start()
    try:
        while True:
            status, details = status_of(run)
            if status and status != shown:
                say(f"run {run}: {status}")
                shown = status
            if status.startswith(("finished", "unknown")):
                return status, details
            if silent.wait(LOOK):
                silent.clear()
                time.sleep(1.0)  # a run's log ends just before the run does
    finally:
        ended.set()
        follower.join(LAST_WORDS)


def main() -> None:
    """Start, watch, start again; exit as the run did."""
    file = Path(os.environ.get("FEDMASK_RUN", "/run.toml"))
    config = tomllib.loads(file.read_text("utf-8"))
    if "out" not in config:
        sys.exit(f'{file} names no folder: add out = "/runs/NAME"')
    folder = Path(config["out"])
    note = folder / STARTED
    connect(os.environ.get("FEDMASK_CONTROL", "superlink-control:8000"), os.environ.get("FEDMASK_CA", ""))
    left = int(os.environ.get("FEDMASK_RETRIES", "3"))
    run = note.read_text("utf-8").strip() if note.exists() else ""
    if run and status_of(run)[0].startswith(("finished", "unknown")):
        run = ""
    with tempfile.TemporaryDirectory() as temporary:
        app = Path(temporary) / "app"
        stage(app, None, config)
        while True:
            while not (run := run or start(app, file, note)):
                time.sleep(POLL)
            status, details = watch(run, folder / LOG)
            if status == "finished:completed" and (config.get("compare") or (folder / MASK).exists()):
                return
            if lost := status == "finished:completed":
                details = f"{MASK} was not saved: is the disk of {folder} full?"
            if status == "finished:stopped" or left == 0:
                sys.exit(f"run {run} did not complete ({status}: {details}); {folder / LOG} says why")
            say(f"run {run} did not complete ({status}: {details}); starting it again, {left} tries are left")
            time.sleep(ROOM if lost else 0.0)
            left, run = left - 1, ""


if __name__ == "__main__":
    main()
