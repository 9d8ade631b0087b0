"""A private place for one run's processes, and the promise that none of them outlives it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fedmask_flwr.simulation import reaper

__all__ = ["Interrupted", "LeftoverError", "Sandbox", "sandbox", "scripts", "stop_signals"]

# Ray keeps Unix sockets (at most 107 bytes of path) 68 bytes below this folder.
_MAX_TMP = 36


class Interrupted(SystemExit):
    """A signal ended this process; the run was cleaned up."""


class LeftoverError(RuntimeError):
    """A process of the run could not be ended."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """One run's private folder, its token, and the environment of every process in it."""

    folder: Path
    token: str
    env: Mapping[str, str]

    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def alive(self) -> list[int]:
        """List the run's living processes."""
        return reaper.tagged(self.token, str(self.folder))

    def spawn(self, command: list[str], sink: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a process of the run, with both its outputs into `sink`."""
        child = subprocess.Popen(  # noqa: S603
            command,
            cwd=self.folder / "cwd",  # neutral: Ray imports a package that lies in the working directory first
            env={**self.env, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.children.append(child)
        return child


def scripts() -> Path:
    """Give the folder of this interpreter's executables."""
    return Path(sysconfig.get_path("scripts"))


@contextlib.contextmanager
def sandbox(threads: str, extra_path: str) -> Iterator[Sandbox]:
    """Make a place; on the way out, or when this process dies, a watchdog ends what runs there."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="fedmask-", dir=base if len(base) + 17 <= _MAX_TMP else "/tmp"))  # noqa: S108
    folder = folder.resolve()
    token = secrets.token_hex(16)
    home = folder / "home"
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", threads)
    env.update(
        {
            reaper.ENV: token,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": "local",  # never join a cluster that is already here
            "RAY_TMPDIR": str(folder),
            "SPT_NOENV": "1",  # Ray renames its workers in memory that would hold the token
            "NO_PROXY": ",".join(filter(None, [env.get("NO_PROXY"), "127.0.0.1"])),
            "no_proxy": ",".join(filter(None, [env.get("no_proxy"), "127.0.0.1"])),
            "PYTHONPATH": os.pathsep.join([*_absolute(env.get("PYTHONPATH", "")), *filter(None, [extra_path])]),
            "PATH": os.pathsep.join([str(scripts()), env.get("PATH", os.defpath)]),
        }
    )
    watchdog = subprocess.Popen(  # noqa: S603
        [sys.executable, "-I", reaper.__file__, token, str(folder)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    place = Sandbox(folder, token, env)
    try:
        for sub in (home, folder / "cwd"):
            sub.mkdir()
        yield place
    finally:
        with _deaf():
            assert watchdog.stdin is not None
            watchdog.stdin.close()
            left = watchdog.wait() != 0
            for child in place.children:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=1 if left else 10)
    if left:
        raise LeftoverError("some processes of the run could not be ended; look for them with: ps -ef | grep ray")


def _absolute(path: str) -> list[str]:
    """Folders of a search path, as seen from here: the run's processes work elsewhere."""
    return [str(Path(entry).absolute()) for entry in path.split(os.pathsep) if entry]


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an exception, so that the run is cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    wanted = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, stop) for s in wanted}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let no second Ctrl-C cut the cleaning short."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
