"""A watchdog process: when its owner closes the pipe or dies, nothing the owner started survives.

Run as a file, with the standard library only. Ray's daemons leave their parent's process group and session,
so the processes of a run are recognised by what they inherit: a token in the environment, or a working
directory inside the run's private folder.

    python -I reaper.py TOKEN FOLDER      # standard input: the read end of the owner's pipe
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["ENV", "tagged"]

ENV = "FEDMASK_RUN_TOKEN"
_PROC = Path("/proc")
_DEADLINE_S = 20.0


def tagged(token: str, folder: str) -> list[int]:
    """List the processes that carry the token or work inside the folder, this one left out."""
    if not _PROC.joinpath("self", "environ").exists():
        return _tagged_ps(token)
    needle = f"{ENV}={token}".encode()
    found = []
    for entry in _PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0") or _inside(entry / "cwd", folder):
                found.append(int(entry.name))
        except OSError:  # gone, a zombie, or somebody else's
            continue
    return sorted(found)


def _inside(link: Path, folder: str) -> bool:
    at = os.readlink(link)  # noqa: PTH115 - Path.readlink drops the " (deleted)" this must tolerate
    return bool(folder) and (at == folder or at.startswith((folder + "/", folder + " (deleted)")))


def _tagged_ps(token: str) -> list[int]:
    """Do the same on systems without /proc, by the environments that ps shows."""
    got = subprocess.run(["ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=False)  # noqa: S607
    lines = (line.split(None, 1) for line in got.stdout.splitlines() if f"{ENV}={token}" in line)
    return sorted(int(words[0]) for words in lines if int(words[0]) != os.getpid())


def _kill_all(token: str, folder: str) -> list[int]:
    deadline = time.monotonic() + _DEADLINE_S
    quiet = 0
    left: list[int] = []
    while time.monotonic() < deadline:
        left = tagged(token, folder)
        # A process may fork while it is looked for, so one empty scan is not enough.
        quiet = 0 if left else quiet + 1
        if quiet == 3:
            return []
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        time.sleep(0.05)
    return left


def _wait_for_owner() -> None:
    owner = os.getppid()
    while True:
        # A forked copy of the owner may still hold the pipe open after the owner died.
        ready, _, _ = select.select([0], [], [], 1.0)
        if ready or os.getppid() != owner:
            return


def main() -> int:
    """Wait for the owner to finish or die, kill its processes, delete its folder; 1 when any is left."""
    token, folder = sys.argv[1:3]
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    _wait_for_owner()
    left = _kill_all(token, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
