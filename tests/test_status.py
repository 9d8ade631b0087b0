"""``fedmask status``: what a folder tells, without touching it."""

from __future__ import annotations

import fcntl
import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fedmask_flwr import locks, standing
from fedmask_flwr.cli import app
from fedmask_flwr.standing import NoRunError, comparison, span, stand

NOW = 1_800_000_000.0
CONFIG = {
    "method": "deltamask", "data": "digits", "model": "mlp", "weights": "seed", "seed": 7, "num-server-rounds": 10,
    "node-timeout": 600.0, "round-timeout": 3600.0, "scenario": "",
}  # fmt: skip
WAYS = ("uplink_bytes", "downlink_bytes", "evaluate_bytes", "flower_uplink_bytes", "flower_downlink_bytes")


def line(number, **more):
    cost = {way: 1000 * (i + 1) for i, way in enumerate(WAYS)}
    seconds = 90.0 if number == 1 else 30.0
    accuracy = {"accuracy_threshold": 0.5 + number / 100, "loss": 1.0}
    return {"round": number, **cost, **accuracy, "clients_ok": 3, "clients_failed": 0, "seconds": seconds, **more}


def make(folder, rounds=4, *, age=5.0, mask=False, at=None, **more):
    """A run's folder whose last round was written ``age`` seconds before NOW."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    (folder / ".lock").write_text("")
    if rounds:
        rows = "".join(json.dumps(line(number)) + "\n" for number in range(1, rounds + 1))
        (folder / "metrics.jsonl").write_text(rows)
        meta = {"fedmask": json.dumps({"meta": {"round": at or rounds}})}
        save_file({"x": np.zeros(1)}, folder / "checkpoint.safetensors", meta)
    if mask:
        (folder / "mask.fedmask").write_bytes(b"x")
    for path in folder.iterdir():
        os.utime(path, (NOW - age, NOW - age))
    return folder


@pytest.fixture
def held(monkeypatch):
    """Say who holds the folder."""
    told = {"held": True}
    monkeypatch.setattr(locks, "held", lambda _path: told["held"])
    monkeypatch.setattr(locks, "sees_all", lambda: True)
    return told


def test_running(tmp_path, held):
    got = stand(make(tmp_path / "a", at=3), now=NOW)
    assert (got.state, got.reason, got.round, got.rounds, got.held) == ("running", "", 4, 10, True)
    assert got.age == 5
    assert got.rounds_per_hour == 120  # the first round waits for nodes
    assert got.left == 6 * 30 - 5
    assert got.figures == {"accuracy_threshold": 0.54, "loss": 1.0}
    assert got.bytes == {way: 4000 * (i + 1) for i, way in enumerate(WAYS)}
    assert got.failures == standing.Failures(0, 0, 0, 0)
    assert (got.checkpoint_round, got.checkpoint_age) == (3, 5)
    assert got.disk_free > 0
    assert got.told == {k: CONFIG[k] for k in ("method", "data", "model", "weights", "seed")}


@pytest.mark.parametrize(
    ("rounds", "mask", "holds", "age", "state", "words"),
    [
        (10, True, False, 1e6, "finished", ""),
        (10, False, True, 10, "running", ""),
        (10, False, False, 10, "stopped", "mask.fedmask is not"),
        (4, False, True, 149, "running", ""),
        (4, False, True, 151, "stalled", "ends after round-timeout (60 min) at the latest"),
        (4, False, True, 4000, "stalled", "no round in 67 min"),
        (4, False, False, 5, "stopped", "no server holds the folder"),
        (4, False, None, 5, "running", ""),
        (4, False, None, 1000, "stalled", "no round in"),
        (0, False, True, 4000, "waiting", "waits for nodes"),
        (0, False, True, 4300, "stalled", "no round in"),
        (0, False, False, 5, "stopped", "no server"),
    ],
)
def test_states(tmp_path, held, rounds, mask, holds, age, state, words):
    held["held"] = holds
    got = stand(make(tmp_path / "a", rounds, mask=mask, age=age), now=NOW)
    assert got.state == state
    assert words in got.reason
    assert bool(got.reason) == bool(words)
    assert (got.left is not None) == (state == "running")


def test_a_run_that_was_given_up(tmp_path, held):
    """Its server said why before it ended; while another holds the folder, that is history."""
    folder = make(tmp_path / "a")
    (folder / "failed.txt").write_text("SilenceError: no client gave\na usable reply in 3 rounds")
    assert stand(folder, now=NOW).state == "running"
    for held["held"] in (False, None):
        got = stand(folder, now=NOW)
        assert (got.state, got.reason) == ("failed", "SilenceError: no client gave a usable reply in 3 rounds")
    (folder / "metrics.jsonl").unlink()
    assert stand(folder, now=NOW).state == "failed"


def test_from_inside_a_container_a_fresh_round_counts(tmp_path, held, monkeypatch):
    """Another container's lock is not seen: only time tells that it is gone."""
    monkeypatch.setattr(locks, "sees_all", lambda: False)
    held["held"] = False
    assert stand(make(tmp_path / "a"), now=NOW).state == "running"
    assert stand(tmp_path / "a", now=NOW + 200).state == "stopped"


def test_stall_is_an_option(tmp_path, held):
    folder = make(tmp_path / "a", age=50)
    assert stand(folder, now=NOW).state == "running"
    assert stand(folder, now=NOW, stall=40).state == "stalled"


def test_failures_and_the_latest_figures(tmp_path, held):
    folder = make(tmp_path / "a", 1)
    rows = [
        line(1, clients_failed=2), line(2, client_accuracy_mean=0.25), line(3, evaluations_failed=1), line(4),
        {"round": 5, "accuracy_threshold": float("nan"), "seconds": 30.0},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"round": 6, "acc')  # a line that is being written
    got = stand(folder, now=NOW)
    assert got.round == 5
    assert got.failures == standing.Failures(2, 1, 2, 3)
    assert got.figures == {"accuracy_threshold": 0.54, "loss": 1.0, "client_accuracy_mean": 0.25}


def test_a_clock_that_was_set_back(tmp_path, held):
    assert stand(make(tmp_path / "a", age=-500), now=NOW).age == 0


def snapshot(folder):
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ctime_ns, p.read_bytes()) for p in folder.iterdir()}


def test_the_folder_is_not_touched(tmp_path):
    folder = make(tmp_path / "a")
    before = snapshot(folder)
    stand(folder)
    CliRunner().invoke(app, ["status", str(folder)])
    assert snapshot(folder) == before


def test_the_kernel_says_who_holds_a_lock(tmp_path):
    file = tmp_path / ".lock"
    assert locks.held(file) is False
    file.write_text("")
    assert locks.held(file) is False
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert locks.held(file) is True
    assert locks.held(file) is False
    assert locks.held(file, tmp_path / "none") is None


def test_layered_file_systems_and_other_kinds_of_locks(tmp_path):
    file, table = tmp_path / ".lock", tmp_path / "locks"
    file.write_text("")
    inode, device = file.stat().st_ino, file.stat().st_dev
    where = f"{os.major(device):02x}:{os.minor(device):02x}"
    for text, expected in (
        (f"1: FLOCK  ADVISORY  WRITE 7 {where}:{inode} 0 EOF\n", True),
        (f"1: POSIX  ADVISORY  WRITE 7 {where}:{inode} 0 EOF\n", False),
        (f"1: FLOCK  ADVISORY  WRITE 7 {where}:{inode + 1} 0 EOF\n", False),
        ("1: -> FLOCK  ADVISORY\nnonsense\n", False),
    ):
        table.write_text(text)
        assert locks.held(file, table) is expected


def test_no_run(tmp_path):
    with pytest.raises(NoRunError, match=r"no config\.json"):
        stand(tmp_path)
    for damage in ("{", "[]", '{"num-server-rounds": "x"}', '{"round-timeout": "x"}'):
        (tmp_path / "config.json").write_text(damage)
        with pytest.raises(NoRunError, match="damaged"):
            stand(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(NoRunError, match="cannot be read"):
        stand(tmp_path)


def test_a_damaged_line_costs_itself(tmp_path):
    make(tmp_path / "run", 4)
    metrics = tmp_path / "run/metrics.jsonl"
    lies = b'{"round": 3, "seconds": "x", "uplink_bytes": NaN, "clients_failed": [1]}\n'
    metrics.write_bytes(b"\xff\n{\n" + lies + metrics.read_bytes() + b'{"round": 9')
    assert stand(tmp_path / "run").round == 4


# a comparison


def compared(folder, held):
    entries = []
    for name, error in (("a-s1", ""), ("b-s1", "OSError: full"), ("c-s1", ""), ("d-s1", "")):
        entries.append({"folder": name, "error": error})
    make(folder / "a-s1", 10, mask=True)
    make(folder / "b-s1", 4)
    make(folder / "c-s1", 4)
    (folder / "runs.json").write_text(json.dumps({"runs": entries}))
    return folder


def test_comparison(tmp_path, held):
    folder = compared(tmp_path / "all", held)
    got = comparison(folder, now=NOW)
    assert [run.state for run in got] == ["finished", "failed", "running", "waiting"]
    assert got[1].reason == "OSError: full"
    held["held"] = False
    got = comparison(folder, now=NOW)
    assert [run.state for run in got] == ["finished", "failed", "stopped", "stopped"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"runs": [{"folder": "../x"}]}', '{"runs": [{}]}', '{"runs": [3]}'])
def test_a_damaged_index(tmp_path, damage):
    (tmp_path / "runs.json").write_text(damage)
    with pytest.raises(NoRunError, match="damaged"):
        comparison(tmp_path)


# the command


def status(*args):
    done = CliRunner().invoke(app, ["status", *map(str, args)])
    return done.exit_code, done.output


def test_what_is_printed(tmp_path, held, monkeypatch):
    monkeypatch.setattr(standing.time, "time", lambda: NOW)
    code, text = status(make(tmp_path / "a"))
    assert code == 0
    for words in (
        "running, round 4 of 10, 5 s ago", "120 rounds an hour, about 3 min left", "threshold 0.5400", "loss 1",
        "4 kB up, 8 kB down, 12 kB to evaluate; Flower's own 36 kB",
        "0 replies and 0 evaluations in 0 of 4 rounds", "round 4, 5 s ago", "free", "method deltamask, data digits",
    ):  # fmt: skip
        assert words in text
    code, text = status(tmp_path / "a", "--stall", 1)
    assert code == 1
    assert text.startswith("stalled, round 4 of 10")
    code, text = status(tmp_path)
    assert code == 2
    assert "name the folder" in " ".join(text.split())


def test_json_is_what_is_known(tmp_path, held, monkeypatch):
    monkeypatch.setattr(standing.time, "time", lambda: NOW)
    make(tmp_path / "a", 10, mask=True)
    code, text = status(tmp_path / "a", "--json")
    got = json.loads(text)
    assert (code, got["state"], got["left"], got["failures"]["clients"]) == (0, "finished", None, 0)
    code, text = status(compared(tmp_path / "all", held), "--json")
    assert code == 1
    assert [run["state"] for run in json.loads(text)["runs"]] == ["finished", "failed", "running", "waiting"]
    code, text = status(tmp_path / "all")
    assert [row.split(",")[0] for row in text.splitlines()][:2] == ["a-s1: finished", "b-s1: failed"]
    assert "OSError: full" in text


def test_status_is_quick():
    """For scripts that ask every minute on a small machine."""
    import subprocess
    import sys

    code = "import sys, fedmask_flwr.status; print(sorted({'torch', 'flwr', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (99, "99 s"), (600, "10 min"), (7200, "2 h"), (1e6, "12 days")]
)
def test_span(seconds, text):
    assert span(seconds) == text


def test_a_real_server_holds_its_folder(tmp_path):
    from fedmask_flwr.track import RunDir

    run = RunDir(tmp_path / "a", CONFIG)
    run.record(line(1))
    assert stand(tmp_path / "a").held is True
    assert stand(tmp_path / "a").state == "running"
    run.close()
    assert stand(tmp_path / "a").held is False
    assert stand(tmp_path / "a", now=time.time() + 1000).state == "stopped"
