"""``fedmask compare`` and ``fedmask report``, with a stand-in for the simulation."""

from __future__ import annotations

import fcntl
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedmask_flwr.cli import app
from fedmask_flwr.compare import lineup
from fedmask_flwr.compare.results import enrol, mark
from fedmask_flwr.simulation import SimulationError, comparing, stage
from fedmask_flwr.simulation.runtime import _extra_path, _Feed

LINE = {
    "accuracy_threshold": 0.5, "client_accuracy_mean": 0.25, "uplink_bytes": 4000, "downlink_bytes": 90_000,
    "uplink_bpp": 0.125, "clients_ok": 2, "clients_failed": 0, "evaluations_failed": 0, "seconds": 3.5,
}  # fmt: skip
METHODS = ("compare", "--methods", "fedpm, deltamask(kappa=1.0)", "--seeds", "2", "--rounds", "2")


def fedmask(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def said(result):
    return " ".join(result.output.split())


class Simulation:
    """Writes what a server would, except for the runs that it is told to break."""

    def __init__(self):
        self.calls, self.breaks = [], ()

    def __call__(self, config, *, num_clients, out, on_round, runs, cpus_per_client, gpus_per_client):
        self.calls.append((dict(config), num_clients, out, list(runs)))
        whole = lineup({**stage.defaults(), **config})
        enrol(out, whole)
        for run in (run for run in whole if run.folder in runs):
            if run.label in self.breaks:
                mark(out, run.folder, "ValueError: told to fail")
                continue
            folder = out / run.folder
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(run.config))
            for number in range(1, run.config["num-server-rounds"] + 1):
                row = {"round": number, **LINE}
                with (folder / "metrics.jsonl").open("a") as f:
                    f.write(json.dumps(row) + "\n")
                on_round({**row, "run": run.folder})
            for name in ("checkpoint.safetensors", "mask.fedmask"):
                (folder / name).write_bytes(b"x")
        memory = Path(config["memory-dir"]) / "0123"
        memory.mkdir(parents=True, exist_ok=True)
        (memory / "0.000001.safetensors").write_bytes(b"x")
        if self.breaks:
            raise SimulationError("Flower says finished:failed: 1 of 4 runs failed")


@pytest.fixture
def simulation(monkeypatch):
    stand_in = Simulation()
    monkeypatch.setattr(comparing, "simulate", stand_in)
    return stand_in


def test_options_and_what_is_shown(tmp_path, simulation):
    done = fedmask(*METHODS, "--clients", "3", "--batch-size", "8", "-c", "theta0=0.25", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    ((config, clients, out, runs),) = simulation.calls
    assert (clients, out) == (3, tmp_path / "a")
    assert runs == ["fedpm-s7", "deltamask_kappa=1.0-s7", "fedpm-s8", "deltamask_kappa=1.0-s8"]
    assert config == {
        "num-server-rounds": 2, "batch-size": 8, "theta0": 0.25, "clients": 3, "seeds": "7,8",
        "memory-dir": str(tmp_path / "a/memory"), "compare": "fedpm, deltamask(kappa=1.0)",
    }  # fmt: skip
    text = said(done)
    assert "4 runs on digits, mlp, weights seed: 3 clients, 2 rounds each" in text
    assert "[2/4] deltamask(kappa=1.0) seed 7: threshold 0.5000, clients 0.2500, 8 kB up, 180 kB down" in text
    assert "fedpm 2 0.5000 0.2500 deltamask(kappa=1.0) 2 0.5000 0.2500" in text
    assert "deltamask(kappa=1.0) 8 kB 180 kB 0.1250 3.5 0" in text
    for name in ("compare.json", "table.md", "compare.png"):
        assert (out / name).stat().st_size > 100


def test_seed_list_and_first_seed(tmp_path, simulation):
    words = ["compare", "--methods", "fedpm", "--rounds", "1"]
    assert fedmask(*words, "--seed-list", "4, 9", "--out", tmp_path / "a").exit_code == 0
    assert fedmask(*words, "--seeds", "1", "-c", "seed=5", "--out", tmp_path / "b").exit_code == 0
    assert fedmask(*words, "--out", tmp_path / "c").exit_code == 0
    assert [call[3] for call in simulation.calls] == [
        ["fedpm-s4", "fedpm-s9"], ["fedpm-s5"], ["fedpm-s7", "fedpm-s8", "fedpm-s9"]
    ]  # fmt: skip


@pytest.mark.parametrize("seed", ["7.5", "abc"])
def test_a_first_seed_that_is_no_number(seed, tmp_path, simulation):
    done = fedmask("compare", "--methods", "fedpm", "--seeds", "2", "-c", f"seed={seed}", "--out", tmp_path / "a")
    assert (done.exit_code, simulation.calls) == (2, [])
    assert "seed" in said(done)


def test_a_run_does_not_move_into_a_comparison(tmp_path, simulation):
    assert fedmask(*METHODS, "--out", tmp_path / "a").exit_code == 0
    memory = sorted((tmp_path / "a/memory").rglob("*"))
    for more in ([], ["--overwrite"]):
        done = fedmask("run", "--out", tmp_path / "a", *more)
        assert done.exit_code == 2
        assert "holds a comparison" in said(done)
    assert sorted((tmp_path / "a/memory").rglob("*")) == memory


def test_complete_runs_are_kept_and_added_to(tmp_path, simulation):
    args = (*METHODS, "--out", tmp_path / "a")
    assert fedmask(*args).exit_code == 0
    done = fedmask(*args)
    assert done.exit_code == 0
    assert "4 of them are complete" in said(done)
    assert "fedpm 2 0.5000 0.2500" in said(done)
    assert len(simulation.calls) == 1
    done = fedmask("compare", "--methods", "fedpm,fedavg", "--seeds", "2", "--rounds", "2", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert simulation.calls[1][3] == ["fedavg-s7", "fedavg-s8"]
    assert "fedavg 2 0.5000" in said(done)
    assert "deltamask(kappa=1.0) 2 0.5000" in said(done)


@pytest.mark.parametrize("file", ["fedpm-s8/config.json", "runs.json"])
def test_another_comparison_is_refused_and_overwritten_on_request(tmp_path, simulation, file):
    out = tmp_path / "a"
    assert fedmask(*METHODS, "--out", out).exit_code == 0
    (out / "notes.txt").write_text("mine")
    (out / "fedpm-s7" / "notes.txt").write_text("mine")
    (out / "memory" / "notes.txt").write_text("mine")
    other = ("compare", "--methods", "fedavg", "--seeds", "1", "--rounds", "3", "--out", out)
    done = fedmask(*other)
    assert done.exit_code == 2
    assert "has num-server-rounds" in said(done)
    assert len(simulation.calls) == 1
    (out / file).write_text('{"damaged')
    done = fedmask(*other, "--overwrite")
    assert done.exit_code == 0, done.output
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {path for path in left if "notes" in path} == {"notes.txt", "fedpm-s7/notes.txt", "memory/notes.txt"}
    assert not {path for path in left if path.startswith("deltamask") or "fedpm-s8" in path}


def test_a_failed_run_is_shown_and_exits_1(tmp_path, simulation):
    simulation.breaks = ("fedpm",)
    done = fedmask(*METHODS, "--out", tmp_path / "a")
    assert done.exit_code == 1
    assert "deltamask(kappa=1.0) 2 0.5000 0.2500" in said(done)
    assert "fedpm, seed 7: ValueError: told to fail" in said(done)
    assert "Flower says finished:failed" in said(done)


def test_ctrl_c_exits_130(tmp_path, monkeypatch):
    def stops(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "simulate", stops)
    done = fedmask(*METHODS, "--out", tmp_path / "a")
    assert done.exit_code == 130
    assert "the same command resumes" in said(done)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "fedpm("], "cannot read 'fedpm('"),
        (["--methods", "fedpm(kappa=1)"], "unknown run-config key kappa"),
        (["--methods", "fedpm, fedavg", "-c", "kappa=1"], "no method here reads kappa"),
        (["-c", "learning-rat=1"], "unknown run-config key learning-rat. Did you mean learning-rate"),
        (["-c", "learning-rate=x"], "learning-rate = 'x'"),
        (["-c", "alpha"], "write KEY=VALUE"),
        (["-c", "method=fedpm"], "use --methods"),
        (["-c", "compare=fedpm"], "use --methods"),
        (["-c", "seeds=1"], "use --seeds or --seed-list"),
        (["-c", "out=x"], "use --out"),
        (["-c", "fraction-evaluate=0"], "give fraction-evaluate above 0"),
        (["--seeds", "2", "--seed-list", "1"], "give one"),
        (["--seed-list", "1,1"], "one is there twice"),
        (["--rounds", "0"], "num-server-rounds"),
        (["--clients", "1"], "add -c min-nodes=1"),
        (["--clients", "1401"], "1401 clients cannot share 1400 training rows"),
        (["--partition", "group"], "partition 'group' needs to know whose each row is"),
        (["-c", "include=layers.*"], "pattern 'layers.*' matches no parameter"),
        (["--methods", "fedpm, fedavg(include=layers.*)"], "pattern 'layers.*' matches no parameter"),
    ],
)
def test_wrong_options(tmp_path, simulation, words, message):
    given = words if "--methods" in words else ["--methods", "fedpm,deltamask", *words]
    done = fedmask("compare", "--out", tmp_path / "a", *given)
    assert done.exit_code == 2, done.output
    assert message in said(done)
    assert not simulation.calls
    assert not (tmp_path / "a").exists()


def test_wrong_folders(tmp_path, simulation):
    (tmp_path / "single").mkdir()
    (tmp_path / "single/config.json").write_text("{}")
    done = fedmask(*METHODS, "--out", tmp_path / "single")
    assert (done.exit_code, "holds a single run" in said(done)) == (2, True)
    (tmp_path / "held").mkdir()
    with (tmp_path / "held/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = fedmask(*METHODS, "--out", tmp_path / "held", "--overwrite")
    assert (done.exit_code, "another run is writing" in said(done)) == (2, True)
    done = fedmask("report", tmp_path / "none")
    assert (done.exit_code, "holds no comparison" in said(done)) == (1, True)


def test_run_refuses_the_keys_of_a_comparison(tmp_path):
    for key in ("compare=fedpm", "seeds=1"):
        done = fedmask("run", "--out", tmp_path / "a", "-c", key)
        assert (done.exit_code, "use fedmask compare" in said(done)) == (2, True)


def test_report_draws_again(tmp_path, simulation):
    assert fedmask(*METHODS, "--out", tmp_path / "a").exit_code == 0
    for name in ("compare.json", "table.md", "compare.png"):
        (tmp_path / "a" / name).unlink()
    done = fedmask("report", tmp_path / "a")
    assert done.exit_code == 0
    assert "fedpm 2 0.5000 0.2500" in said(done)
    assert {"compare.json", "table.md", "compare.png"} <= {path.name for path in (tmp_path / "a").iterdir()}


def test_progress_in_a_terminal():
    runs = lineup({**stage.defaults(), "compare": "fedpm, deltamask", "seeds": "1"})
    file = io.StringIO()
    with comparing.Progress(Console(file=file, force_terminal=True, width=120), runs, 2) as progress:
        progress.add({"round": 1, "run": "fedpm-s1"})
        assert "fedpm seed 1, round 1 of 2; 0 of 2 runs finished" in str(progress.status.status)
        progress.add({"round": 2, "run": "deltamask-s1", "accuracy_threshold": 0.5, "uplink_bytes": 1})
        progress.add({"round": 2, "run": "deltamask-s1", "accuracy_threshold": 0.5})
    assert (
        file.getvalue().count("[1/2] deltamask seed 1: threshold 0.5000\n") == 1
    )  # round 1 was not seen: no bytes


# The launcher's folder and the simulation's feed


def test_rows_of_several_runs(tmp_path):
    feed = _Feed(tmp_path, ["a", "b"])
    assert feed.new() == []
    for run in "ab":
        (tmp_path / run).mkdir()
        (tmp_path / run / "metrics.jsonl").write_text('{"round": 1}\n')
    assert feed.new() == [{"round": 1, "run": "a"}, {"round": 1, "run": "b"}]
    assert feed.new() == []


def test_one_s_own_method_in_a_comparison_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    for text in ("mine:Own", "fedpm, mine:Own", "mine:Own(a=1 b=2), fedpm", "fedpm(a=1),mine:Own (b=1)"):
        assert _extra_path({"seed": 1, "compare": text}) == str(tmp_path)
    for text in ("fedpm", "other:Own", "fedpm(include=mine:Own)", "xmine:Own, fedpm", "seed:7:mine"):
        assert _extra_path({"compare": text}) == ""


def test_memory_of_the_launcher_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from fedmask_flwr.simulation import launch

    given = launch.prepare({}, ["memory-dir=m"], tmp_path / "a", clients=3, overwrite=False).overrides
    assert given["memory-dir"] == str(tmp_path / "m")
    memory = tmp_path / "a/memory/0123456789abcdef"
    memory.mkdir(parents=True)
    (memory / "2.000001.safetensors").write_bytes(b"x")
    launch.prepare({}, [], tmp_path / "a", clients=3, overwrite=False)
    assert memory.exists()
    plan = launch.prepare({}, [], tmp_path / "a", clients=3, overwrite=True)
    assert plan.overrides["memory-dir"] == str(tmp_path / "a/memory")
    assert not (tmp_path / "a/memory").exists()
