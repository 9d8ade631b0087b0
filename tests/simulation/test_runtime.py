from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import standin
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.simulation import reaper, runtime, sandbox, stage

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def token(monkeypatch):
    """A token of this test's own, so that what is left can be counted."""
    mine = os.urandom(16).hex()
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda _n: mine)
    yield mine
    for pid in reaper.tagged(mine, ""):
        os.kill(pid, signal.SIGKILL)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def package_files():
    return [
        str(p.relative_to(REPO))
        for name in ("fedmask_flwr", "server_app", "client_app")
        for p in (REPO / name).rglob("*.py")
    ]


# Staging


def test_stage_copies_exactly_the_app(tmp_path):
    stage.stage(tmp_path / "app")
    assert files(tmp_path / "app") == sorted([*package_files(), "LICENSE", "pyproject.toml"])
    assert (tmp_path / "app" / "pyproject.toml").read_bytes() == (REPO / "pyproject.toml").read_bytes()


def test_stage_from_an_installed_wheel(tmp_path, monkeypatch):
    package = tmp_path / "site" / "fedmask_flwr"
    shutil.copytree(REPO / "fedmask_flwr", package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(stage, "_PACKAGE", package)
    with pytest.raises(stage.StageError, match="reinstall"):
        stage.app_root()
    inner = package / "_app"
    for name in ("server_app", "client_app"):
        shutil.copytree(REPO / name, inner / name)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(REPO / name, inner / name)
    (tmp_path / "site" / "pyproject.toml").write_text('[project]\nname = "somebody-else"\n')
    assert stage.app_root() == inner
    stage.stage(tmp_path / "app")
    assert files(tmp_path / "app") == sorted([*package_files(), "LICENSE", "pyproject.toml"])


def test_stage_declares_keys_of_a_method_from_outside(tmp_path):
    stage.stage(tmp_path / "app", None, {"seed": 3, "my-own-key": "x"})
    config = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert config == {**stage.defaults(), "my-own-key": "x"}


COMMANDS = "cli.py options.py keys_cli.py looks_cli.py doctor.py keys/ checks/ warm/ simulation/ continual/"
EXCLUDED = tuple(f"fedmask_flwr/{name}" for name in COMMANDS.split())


@pytest.mark.flower
def test_the_bundle_is_small_and_holds_the_app_only(tmp_path):
    stage.stage(tmp_path / "app")
    env = {**os.environ, "FLWR_HOME": str(tmp_path / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    env["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    command = [str(sandbox.scripts() / "flwr"), "build", "--app", str(tmp_path / "app")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (fab,) = [*tmp_path.glob("*.fab"), *(tmp_path / "app").glob("*.fab")]
    assert fab.stat().st_size < 1_000_000
    with zipfile.ZipFile(fab) as z:
        held = [name for name in z.namelist() if not name.startswith(".info/")]
        z.extractall(tmp_path / "device")
    kept = [name for name in package_files() if not name.startswith(EXCLUDED)]
    assert sorted(held) == sorted([*kept, "LICENSE", "pyproject.toml"])
    # Both apps, with every method, need nothing that was left out.
    code = (
        "import server_app.main, client_app.main, fedmask_flwr.flower.apps, fedmask_flwr.flower.compare as c\n"
        "from fedmask_flwr.methods import BUILTIN, resolve\n"
        "[resolve(name) for name in BUILTIN]; print(c.__file__)"
    )
    there = {**env, "PYTHONPATH": str(tmp_path / "device")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=there, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "device"))


scalars = st.one_of(st.text(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans())


@given(st.dictionaries(st.text(min_size=1), scalars))
def test_toml_lines(config):
    text = stage.toml_lines(config)
    got = tomllib.loads(text)
    assert got == config
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in config.items()}


# Metrics


def test_metrics_follow_appends_cuts_and_replacement(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"round": 1, "s": 1}\n')
    feed = runtime._Metrics(path)
    assert feed.new() == []
    with path.open("a") as f:
        f.write('{"round": 2, "s": 1}\n{"round": 3')
    assert [r["round"] for r in feed.new()] == [2]
    assert feed.new() == []
    with path.open("a") as f:
        f.write(', "s": 1}\nnonsense\n[1]\n')
    assert [r["round"] for r in feed.new()] == [3]
    (tmp_path / "new").write_text('{"round": 1, "s": 1}\n{"round": 2, "s": 9}\n')
    (tmp_path / "new").rename(path)
    assert feed.new() == [{"round": 2, "s": 9}]


# The sandbox, with plain processes

ESCAPE = """
import os, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
with open(sys.argv[1] + ".new", "w") as f: f.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def escape(said, **how):
    """Start a daemon that left its session and its parent; give its process id."""
    subprocess.run([sys.executable, "-c", ESCAPE, str(said)], check=True, **how)
    return int(standin.wait_for(said))


def test_sandbox_ends_daemons_and_deletes_its_folder(tmp_path, token):
    with sandbox.sandbox("1", "") as place:
        tagged = escape(tmp_path / "a", env=dict(place.env))
        # Recognised by its working directory alone: its environment is empty.
        inside = escape(tmp_path / "b", env={}, cwd=place.folder / "cwd")
        assert place.alive() == sorted([tagged, inside])
        assert place.env["FLWR_HOME"].startswith(str(place.folder))
    assert not place.folder.exists()
    assert reaper.tagged(token, str(place.folder)) == []


def test_a_relative_search_path_means_the_same_in_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["src", "", "/x"]))
    with sandbox.sandbox("1", "/here") as place:
        assert place.env["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "src"), "/x", "/here"]


def test_sandbox_cleans_after_an_error(tmp_path, token):
    with pytest.raises(ZeroDivisionError), sandbox.sandbox("1", "") as place:
        escape(tmp_path / "a", env=dict(place.env))
        _ = 1 / 0
    assert reaper.tagged(token, "") == []
    assert not place.folder.exists()


OWNER = """
import signal, subprocess, sys, time
from pathlib import Path
# A background job of a shell, such as CI may be, inherits these ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
from fedmask_flwr.simulation import sandbox
sandbox.secrets.token_hex = lambda n: sys.argv[1]
with sandbox.stop_signals(), sandbox.sandbox("1", "") as place:
    said = Path(sys.argv[2])
    subprocess.run([sys.executable, "-c", sys.argv[3], str(said / "pid")], env=dict(place.env), check=True)
    while not (said / "pid").exists():
        time.sleep(0.01)
    (said / "new").write_text(str(place.folder))
    (said / "new").rename(said / "folder")
    time.sleep(600)
"""


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", -2), ("SIGKILL", -9)])
def test_signals_leave_nothing(tmp_path, token, number, code):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, token, str(tmp_path), ESCAPE], stderr=subprocess.PIPE, start_new_session=True
    )
    folder = standin.wait_for(tmp_path / "folder")
    assert int((tmp_path / "pid").read_text()) in reaper.tagged(token, folder)
    owner.send_signal(getattr(signal, number))
    owner.communicate(timeout=30)
    assert owner.returncode == code
    assert standin.wait_gone(token, folder) == []
    for _ in range(200):  # the watchdog deletes it after its last look
        if not Path(folder).exists():
            break
        time.sleep(0.05)
    assert not Path(folder).exists()


# The runner, with executables that only look like Flower's


@pytest.fixture
def fake(tmp_path, monkeypatch, token):
    folder = standin.fake_flower(tmp_path / "bin")
    monkeypatch.setattr(runtime, "scripts", lambda: folder)
    app = standin.app(tmp_path / "standin")

    def run(**kwargs):
        rows = []
        try:
            runtime.run(
                {"mode": "ok", **kwargs}, num_clients=3, out=tmp_path / "out", on_round=rows.append, root=app
            )
        finally:
            assert reaper.tagged(token, "") == []
        return rows

    run.log = tmp_path / "out" / "flower.log"
    return run


def test_completed(fake, tmp_path):
    assert fake() == [{"round": 1}, {"round": 2}]
    assert "a ServerApp says why" in fake.log.read_text()
    assert "a SuperLink says hello" in fake.log.read_text()


def test_what_flower_is_told(fake, tmp_path, monkeypatch):
    seen = []
    real = runtime._flwr

    def spy(place, *args):
        got = real(place, *args)
        if args[0] == "run":
            seen.append(json.loads((place.folder / "cwd" / "seen.json").read_text()))
            seen.append(str(place.folder))
        return got

    monkeypatch.setattr(runtime, "_flwr", spy)
    fake(note='a "quoted" \N{GREEK SMALL LETTER THETA}')
    (config, words, cwd), folder = seen
    assert config == {"mode": "ok", "note": 'a "quoted" \N{GREEK SMALL LETTER THETA}', "out": str(tmp_path / "out")}
    assert words[words.index("--federation-config") + 1] == (
        "num-supernodes=3 client-resources-num-cpus=1 client-resources-num-gpus=0"
    )
    assert cwd == f"{folder}/cwd"


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped"])
def test_a_status_that_is_not_completed_fails(fake, monkeypatch, status):
    monkeypatch.setenv("FAKE_STATUS", status)
    with pytest.raises(
        runtime.SimulationError, match=rf"(?s){status}: because.*ERROR a ServerApp says why.*flower\.log"
    ):
        fake()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FAKE_RUN", "refuses", "Flower refused the run:\nno such key"),
        ("FAKE_RUN", "breaks", "flwr run failed: a warning first\nboom"),
        ("FAKE_SUPERLINK", "refuses", "did not start\na SuperLink says hello"),
    ],
)
def test_runs_that_never_start(fake, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(runtime.SimulationError, match=message):
        fake()


def test_a_superlink_that_dies(fake, monkeypatch):
    monkeypatch.setenv("FAKE_SUPERLINK", "dies")
    monkeypatch.setenv("FAKE_SECONDS", "600")
    with pytest.raises(runtime.SimulationError, match="ended by itself with exit code 9"):
        fake()


def test_an_unfinished_status_is_asked_for_again(fake, monkeypatch):
    answers = iter(["running", "running", "finished:completed"])
    real = runtime._flwr

    def ask(place, *args):
        return {"runs": [{"status": next(answers)}]} if args[0] == "list" else real(place, *args)

    monkeypatch.setattr(runtime, "_flwr", ask)
    monkeypatch.setattr(runtime, "_POLL_S", 0.1)
    assert [r["round"] for r in fake()] == [1, 2]
    assert next(answers, "none left") == "none left"


def test_missing_executables(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "scripts", lambda: tmp_path)
    with pytest.raises(runtime.SimulationError, match="no flwr beside"):
        runtime.run({}, num_clients=2, out=tmp_path / "out", on_round=print)


def test_extra_path_only_for_modules_that_are_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    assert runtime._extra_path({"data": "mine:load"}) == str(tmp_path)
    assert runtime._extra_path({"data": "other:load", "weights": "seed:7", "n": 3}) == ""


# The runner, with Flower


def real_run(app, out, mode, rows):
    runtime.run({"mode": mode}, num_clients=3, out=out, on_round=rows.append, root=app)


@pytest.mark.flower
def test_a_failing_app_fails_the_run_and_leaves_no_process(tmp_path, token):
    rows = []
    app = standin.app(tmp_path / "standin")
    with pytest.raises(
        runtime.SimulationError, match=r"(?s)finished:failed: .*told to fail.*ValueError: told to fail"
    ):
        real_run(app, tmp_path / "out", "fail", rows)
    assert rows == [{"round": 1, "clients_ok": 3}]
    assert reaper.tagged(token, "") == []
    assert "ValueError: told to fail" in (tmp_path / "out" / "flower.log").read_text()


@pytest.mark.flower
@pytest.mark.slow
def test_two_runs_at_once(tmp_path):
    app = standin.app(tmp_path / "standin")
    rows = {"a": [], "b": []}
    threads = [threading.Thread(target=real_run, args=(app, tmp_path / k, "ok", v)) for k, v in rows.items()]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    want = [{"round": 1, "clients_ok": 3}, {"round": 2, "clients_ok": 3}]
    assert rows == {"a": want, "b": want}


RUNNER = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_DFL)
from fedmask_flwr.simulation import runtime, sandbox
sandbox.secrets.token_hex = lambda n: sys.argv[1]
runtime.run({"mode": "hang"}, num_clients=3, out=Path(sys.argv[2]), on_round=print, root=Path(sys.argv[3]))
"""


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGKILL", -9)])
def test_signals_in_the_middle_of_a_round_leave_nothing(tmp_path, token, number, code):
    app, out = standin.app(tmp_path / "standin"), tmp_path / "out"
    out.mkdir()
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(RUNNER), token, str(out), str(app)])
    standin.wait_for(out / "metrics.jsonl")
    assert len(reaper.tagged(token, "")) > 5
    runner.send_signal(getattr(signal, number))
    assert runner.wait(timeout=60) == code
    assert standin.wait_gone(token) == []
