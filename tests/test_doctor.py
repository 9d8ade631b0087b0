"""``fedmask doctor`` as a whole, and the trial of a device in processes of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import servers
from findings import TINY, told
from typer.testing import CliRunner

from fedmask_flwr.checks import (
    CHECKS,
    Asked,
    clock,
    content,
    disks,
    examine,
    machine,
    network,
    peer,
    software,
    trial,
)
from fedmask_flwr.cli import app
from fedmask_flwr.config import load_config
from fedmask_flwr.data.files import OFFLINE
from fedmask_flwr.masks import model_digest
from fedmask_flwr.methods import resolve
from fedmask_flwr.setting import network as build


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(peer, "SECONDS", 0.5)
    monkeypatch.setattr(network, "SECONDS", 0.7)
    for room in (network, clock):
        monkeypatch.setattr(room, "speaks", lambda: "grpc")
    trial.trial.cache_clear()


def digest():
    config, _ = load_config(dict(TINY))
    model = build(config, (8,), 3)
    return model_digest(resolve(config.method).layout(model), model).hex()


def run_folder(path, **more):
    from safetensors.numpy import save_file

    path.mkdir()
    (path / "config.json").write_text(
        json.dumps({**dict(TINY), "out": "/elsewhere", "memory-dir": "/none", **more})
    )
    header = {"fedmask": json.dumps({"meta": {"round": 3, "digest": digest()}})}
    save_file({"x": np.zeros(2)}, path / "checkpoint.safetensors", header)
    return path


def doctor(*args):
    return CliRunner().invoke(app, ["doctor", *map(str, args)])


def test_everything(tmp_path, monkeypatch):
    """The real thing in fresh processes: a device with a run's settings, and a server without TLS."""
    monkeypatch.setattr(software, "import_seconds", lambda: (1.0, {"torch": 1.0}))
    run = run_folder(tmp_path / "run")
    with servers.grpc_server() as port:
        args = ("--superlink", f"127.0.0.1:{port}", "--run", run, "--memory-dir", tmp_path / "m")
        done = doctor(*args, "--json")
    assert done.exit_code == 0, done.output
    got = json.loads(done.stdout)
    found = {one["name"]: one for one in got["findings"]}
    assert list(found) == list(CHECKS)
    assert got["failed"] == 0
    assert found["backbone"]["status"] == "ok"
    assert digest() in found["backbone"]["seen"]
    assert "as the run's checkpoint" in found["backbone"]["seen"]
    assert "150 examples to train, 90 examples to test, of shape 8, 3 classes" in found["data"]["seen"]
    assert found["TLS chain"]["status"] == "warn"
    assert found["channel"]["status"] == found["torch"]["status"].replace("warn", "ok") == "ok"
    assert found["memory"]["status"] in ("ok", "warn")
    assert not (tmp_path / "m").exists()


@pytest.fixture
def inline(monkeypatch):
    """The stages in this process, which has torch already."""
    monkeypatch.setenv(OFFLINE, "1")
    monkeypatch.setattr(software, "import_seconds", lambda: (1.0, {"torch": 1.0}))
    for room in (machine, content):
        monkeypatch.setattr(room, "trial", lambda asked: dict(trial.run(asked.flat())))


def test_another_network(tmp_path, inline):
    run = run_folder(tmp_path / "run")
    done = doctor("--run", run, "--memory-dir", tmp_path / "m", "-c", "seed=8")
    assert done.exit_code == 1
    assert "fail  backbone" in done.stdout
    assert f"the run's checkpoint is of {digest()}" in done.stdout
    assert "-> another model, seed" in done.stdout


def test_missing_data(tmp_path, inline):
    (tmp_path / "empty").mkdir()
    done = doctor("--data", "mnist", "--data-dir", tmp_path / "empty", "--memory-dir", tmp_path / "m")
    assert done.exit_code == 1
    assert "fail  data: DataError: MNIST is not in" in done.stdout
    assert "skip  backbone: needs data" in done.stdout
    assert not any((tmp_path / "empty").iterdir())  # nothing was fetched


def test_what_a_round_needs():
    stages = dict(trial.run(dict(TINY)))
    numel = 8 * 32 + 32 + 32 * 3 + 3
    assert stages["network"]["parameters"] == numel
    # A training batch of 128 through layers of 8, 32, 32 and 3; an evaluation of 1000 through the widest two.
    assert stages["network"]["activations"] == 4 * 128 * 75
    stages = dict(trial.run({**dict(TINY), "fraction-evaluate": 1.0}))
    assert stages["network"]["activations"] == 4 * 1000 * 64
    assert dict(trial.run({}))["network"] == {"error": "no data was named"}


def test_a_process_that_dies_says_where(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 4)")
    monkeypatch.syspath_prepend(tmp_path)
    got = trial.trial(Asked())
    assert got["torch"]["error"].startswith("the process ended here (signal 4)")
    assert set(got) == set(trial.STAGES)


def test_resident():
    got = trial.resident()
    assert got["anonymous"] > 1e6
    assert got["mapped"] > 1e6
    assert trial.resident(disks.Path("none")) == {"anonymous": 0, "mapped": 0}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--superlink", "host"), "HOST:PORT"),
        (("--run", "none"), "is no folder"),
        (("-c", "seed"), "KEY=VALUE"),
        (("-c", "seed=[1]"), "one string, number"),
    ],
)
def test_usage(args, words):
    done = doctor(*args)
    assert done.exit_code == 2
    assert words in done.output


def test_settings_come_from_the_run_then_from_the_options(tmp_path):
    run = run_folder(tmp_path / "run", seed=3)
    asked = Asked(run=run, told=(("model", "mlp"),))
    assert asked.flat() == {"data": "tiny:blobs", "model": "mlp", "seed": 3}
    (run / "config.json").write_text("[]")
    done = doctor("--run", str(run))
    assert (done.exit_code, "no table of settings" in done.output) == (2, True)
    assert "name the folder of a run" in doctor("--run", str(tmp_path)).output
    (finding,) = examine(asked, [CHECKS["data"]])
    told(finding, "fail", "no table of settings")
