"""Warm client processes: what is asked for runs in a fork, as if the program had been started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmask_flwr.warm import shim

TESTS = Path(__file__).parent
SERVER = """
import sys
from pathlib import Path
from fedmask_flwr.warm.server import serve
serve(Path(sys.argv[1]), ["json", "numpy", "no_such_module"], "warm_entry:main")
"""


def wait(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path):
    """The server with an entry of this test's own; yields the socket's path, in a folder like the real one."""
    (tmp_path / shim.BIN).mkdir()
    place = tmp_path / "socket"
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(place)], env=env, stderr=subprocess.PIPE, text=True
    )
    wait(lambda: place.exists() and ready(place))
    yield process, place
    process.kill()
    process.communicate()


def ready(place):
    import socket

    with socket.socket(socket.AF_UNIX) as link:
        try:
            link.connect(str(place))
        except OSError:
            return False
    return True


def start(place, *argv, **env):
    """What Flower does: start ``flwr-clientapp`` by name."""
    return subprocess.run(
        [sys.executable, "-I", "-S", shim.__file__, *argv],
        env={**os.environ, shim.SOCKET: str(place), **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_request_runs_in_a_fork_with_its_own_everything(server, tmp_path):
    process, place = server
    seen = []
    for number in range(2):
        out = tmp_path / f"{number}.json"
        done = start(place, "--token", f"t {number}", "--out", str(out), MINE=f"env {number}")
        assert done.returncode == 0
        wait(out.exists)
        assert "started" in done.stdout or "started" in (tmp_path / f"{number}.json").read_text()
        seen.append(json.loads(out.read_text()))
    assert [s["argv"] for s in seen] == [
        ["flwr-clientapp", "--token", f"t {n}", "--out", str(tmp_path / f"{n}.json")] for n in range(2)
    ]
    assert [s["mine"] for s in seen] == ["env 0", "env 1"]
    assert all(s["parent"] == process.pid and s["pid"] != process.pid and s["warm"] for s in seen)
    assert seen[0]["random"] != seen[1]["random"]
    assert seen[0]["numpy"] != seen[1]["numpy"]
    assert {s["child"] for s in seen} == {0}  # a program can wait for its own children


def test_one_that_dies_leaves_the_server_alone(server, tmp_path):
    _, place = server
    for how in ("raise", "exit", "kill"):
        assert start(place, "--fail", how).returncode == 0
    out = tmp_path / "after.json"
    assert start(place, "--out", str(out)).returncode == 0
    wait(out.exists)


def test_without_a_server_the_real_program_runs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    real = folder / "flwr-clientapp"
    real.write_text('#!/bin/sh\necho "really $@"\n')
    real.chmod(0o755)
    done = start(tmp_path / "none", "--token", "x", PATH=f"{tmp_path / shim.BIN}:{folder}")
    assert done.stdout == "really --token x\n"
    done = start(tmp_path / "none", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "flwr-clientapp is not on PATH" in done.stderr


def test_garbage_is_survived(server, tmp_path):
    import socket

    _, place = server
    for junk in (b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"{bad}", (2**40).to_bytes(8, "little")):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(place))
            link.sendall(junk)
    out = tmp_path / "after.json"
    assert start(place, "--out", str(out)).returncode == 0
    wait(out.exists)


def test_the_server_ends_with_its_supernode(tmp_path):
    """The parent becomes the SuperNode; when that is killed, the server goes, and its folder too."""
    place = tmp_path / "warm" / "socket"
    place.parent.mkdir()
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-m', 'fedmask_flwr.warm.server', {str(place)!r}]); "
        "print(p.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    wait(place.exists, 60)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    wait(lambda: not place.parent.exists(), 120)
    wait(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())
