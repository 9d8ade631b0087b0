"""Warm client processes: what is asked for runs in a fork, as if the program had been started."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from fedmask_flwr.warm import node, shim
from fedmask_flwr.warm.start import PREFIX, STALE, _folder, clean

TESTS = Path(__file__).parent
# Stands for the SuperNode: forks the keeper, as `fedmask_flwr.warm.node` does.
NODE = """
import os, sys, time
from pathlib import Path
from fedmask_flwr.warm.server import keep, listen
folder = Path(sys.argv[1])
places = {name: (listen(folder, name), "warm_entry:main") for name in ("flwr-clientapp", "flower-superexec")}
me = os.getpid()
if os.fork() == 0:
    keep(folder, me, places, ["json", "numpy", "colorsys", "no_such_module"])
time.sleep(600)
"""


def wait(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def warm(tmp_path):
    """A node's process and its folder."""
    folder = tmp_path / "warm"
    (folder / shim.BIN).mkdir(parents=True)
    env = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", NODE, str(folder), "room for the titles of forks, which share its arguments"],
            env=env, stderr=log,
        )  # fmt: skip
    wait(lambda: Path(shim.socket_of(str(folder), node.SUPEREXEC)).exists())
    yield process, folder
    process.kill()
    process.wait()
    wait(lambda: not folder.exists())


def start(folder, *argv, program=node.CLIENT, **env):
    """What Flower does: start ``flwr-clientapp`` by name."""
    return subprocess.run(
        [sys.executable, "-I", "-S", shim.__file__, program, *argv],
        env={**os.environ, shim.FOLDER: str(folder), **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=shim.WAIT + 30,
    )


def told(folder, out, *argv, **options):
    """Start one and read what it found."""
    done = start(folder, *argv, "--out", str(out), **options)
    assert done.returncode == 0, done.stderr
    wait(out.exists)
    return {**json.loads(out.read_text()), "stdout": done.stdout}


def test_a_request_runs_in_a_fork_with_its_own_everything(warm, tmp_path):
    process, folder = warm
    seen = [told(folder, tmp_path / f"{n}.json", "--token", f"t {n}", MINE=f"env {n}") for n in range(2)]
    assert [s["argv"] for s in seen] == [
        ["flwr-clientapp", "--token", f"t {n}", "--out", str(tmp_path / f"{n}.json")] for n in range(2)
    ]
    assert [s["mine"] for s in seen] == ["env 0", "env 1"]
    server = seen[0]["parent"]
    assert all(s["parent"] == server and s["pid"] not in (server, process.pid) and s["warm"] for s in seen)
    assert seen[0]["random"] != seen[1]["random"]
    assert seen[0]["numpy"] != seen[1]["numpy"]
    assert {s["child"] for s in seen} == {0}  # a program can wait for its own children


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_kernel_takes_a_messages_process_first(warm, tmp_path):
    _, folder = warm
    client = told(folder, tmp_path / "client.json")
    superexec = told(folder, tmp_path / "superexec.json", program=node.SUPEREXEC)
    assert client["oom"] == 800
    assert int(Path(f"/proc/{client['parent']}/oom_score_adj").read_text()) < 800
    assert superexec["oom"] < 800
    assert client["title"].startswith("flwr-clientapp --out")
    assert superexec["title"].startswith("flower-superexec --out")
    title = Path(f"/proc/{client['parent']}/cmdline").read_text().strip("\0")
    assert title == "fedmask: warm server"


def test_a_second_program_does_not_wait_for_the_warm_one(warm, tmp_path):
    """The keeper forks it, which has not imported what a client needs."""
    _, folder = warm
    superexec = told(folder, tmp_path / "superexec.json", program=node.SUPEREXEC)
    client = told(folder, tmp_path / "client.json")
    assert (superexec["warm"], client["warm"]) == (False, True)
    parents = Path(f"/proc/{client['parent']}/stat").read_text().rpartition(")")[2].split()
    assert int(parents[1]) == superexec["parent"]


def test_one_that_dies_leaves_the_server_alone(warm, tmp_path):
    _, folder = warm
    before = told(folder, tmp_path / "before.json")
    for how in ("raise", "exit", "kill"):
        assert start(folder, "--fail", how).returncode == 0
    assert told(folder, tmp_path / "after.json")["parent"] == before["parent"]


def test_a_server_that_was_killed_is_started_again(warm, tmp_path):
    """The next message is served warm, by another server, also when it comes while there is none."""
    _, folder = warm
    servers = []
    for number in range(3):
        found = told(folder, tmp_path / f"{number}.json")
        assert found["warm"]
        servers.append(found["parent"])
        os.kill(servers[-1], signal.SIGKILL)
    assert len(set(servers)) == 3
    assert (tmp_path / "log").read_text().count("the warm server ended and is started again") >= 2


def test_without_its_keeper_a_server_ends_and_the_real_program_runs(warm, tmp_path):
    _, folder = warm
    server = told(folder, tmp_path / "client.json")["parent"]
    keeper = told(folder, tmp_path / "superexec.json", program=node.SUPEREXEC)["parent"]
    os.kill(keeper, signal.SIGKILL)
    wait(lambda: not alive(server) and not folder.exists())
    assert start(folder, "--token", "x", PATH=str(real(tmp_path))).stdout == "really --token x\n"


def test_all_end_with_their_supernode(warm, tmp_path):
    """The folder goes too."""
    process, folder = warm
    server = told(folder, tmp_path / "client.json")["parent"]
    keeper = told(folder, tmp_path / "superexec.json", program=node.SUPEREXEC)["parent"]
    process.kill()
    process.wait()
    wait(lambda: not alive(server) and not alive(keeper) and not folder.exists())


def real(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    program = folder / node.CLIENT
    program.write_text('#!/bin/sh\necho "really $@"\n')
    program.chmod(0o755)
    return folder


def test_without_a_server_the_real_program_runs(tmp_path):
    folder = real(tmp_path)
    done = start(tmp_path / "none", "--token", "x", PATH=f"{tmp_path / 'none' / shim.BIN}:{folder}")
    assert done.stdout == "really --token x\n"
    done = start(tmp_path / "none", PATH=str(tmp_path))
    assert done.returncode != 0
    assert "flwr-clientapp is not on PATH" in done.stderr


def test_garbage_is_survived(warm, tmp_path):
    _, folder = warm
    for junk in (b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"{bad}", (2**40).to_bytes(8, "little")):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(shim.socket_of(str(folder), node.CLIENT))
            link.sendall(junk)
    assert told(folder, tmp_path / "after.json")["warm"]


@pytest.fixture
def short():
    """A folder of few letters: a socket's path has 107 at most."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_folders_that_nobody_listens_in_are_removed(short):
    """A SuperNode and its keeper that are killed at once leave theirs."""
    tmp_path = short
    with socket.socket(socket.AF_UNIX) as listening:
        for name in ("dead", "young", "empty", "used"):
            (tmp_path / f"{PREFIX}{name}").mkdir()
        for name in ("dead", "young", "used"):
            place = shim.socket_of(str(tmp_path / f"{PREFIX}{name}"), node.SUPEREXEC)
            if name == "used":
                listening.bind(place)
                listening.listen()
                continue
            with socket.socket(socket.AF_UNIX) as gone:
                gone.bind(place)
        (tmp_path / "other").mkdir()
        past = time.time() - 2 * STALE
        for name in ("dead", "empty", "used"):
            os.utime(tmp_path / f"{PREFIX}{name}", (past, past))
        clean(tmp_path)
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{PREFIX}young", f"{PREFIX}used", "other"}


def test_a_folder_whose_path_is_too_long_for_a_socket_is_passed_over(short, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short / "run"))
    deep = short / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    folder = _folder()
    assert folder.parent == short / "run"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(shim.socket_of(str(folder), node.SUPEREXEC))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setenv("XDG_STATE_HOME", str(deep))
    with pytest.raises(OSError, match="no folder with a short path"):
        _folder()
    assert list(deep.iterdir()) == []


@pytest.mark.flower
@pytest.mark.parametrize("program", [node.CLIENT, node.SUPEREXEC, node.SUPERNODE])
def test_flowers_programs_are_found(program):
    module, _, name = node.entry_of(program).partition(":")
    assert callable(getattr(importlib.import_module(module), name))
