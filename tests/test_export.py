"""`fedmask export`: the plain network computes what the run measured, and nothing wrong is ever written."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from client_app.main import app as client_app
from fedmask_flwr import artifacts, data, export, models
from fedmask_flwr.cli import app
from fedmask_flwr.config import load_config
from fedmask_flwr.flower import MaskStrategy
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.plan import AS_BUILT, Plan
from fedmask_flwr.wire import Frame, Payload, SideInfo, pack

pytestmark = pytest.mark.flower
RUNS = {
    "fedpm": {"method": "fedpm"},
    "fedavg": {"method": "fedavg"},
    "lth": {"method": "lth", "cycle": 1, "cycles": 2},
    "mpfl": {"method": "mpfl", "search_rounds": 2, "keep_min": 4, "prune_to": 0.6},
    "pruning-fl": {"method": "pruning-fl", "search_rounds": 2, "keep_min": 4},
    "fedmask": {"method": "fedmask", "prune": 0.5, "prune_layers": 3, "prune_by": "neuron"},
    "lg-fedavg": {"method": "fedmask_flwr.methods.lg_fedavg:LgFedAvg", "shared_layers": 1},
    "standalone": {"method": "standalone"},
    "personal": {"method": "personal:Personal"},
    "fedcode": {"method": "fedmask_flwr.methods.fedcode:FedCode", "centres": 16},
    "bnn": {"method": "fedmask_flwr.methods.bnn_fedavg:BnnFedAvg"},
}
ON_DEVICES = {"fedmask", "lg-fedavg", "standalone"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs by name, each made once; do not write into them."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name) / "run"
            changes = {
                "num_server_rounds": 4,
                "learning_rate": 0.05,
                "memory_dir": str(folder / "memory"),
                **RUNS[name],
            }
            config = tiny.run_config(out=str(folder), **changes)
            serve(LoopbackGrid(client_app, 2, config), Context(1, 1, {}, RecordDict(), config))
        return made[name]

    return run


@pytest.fixture
def own(runs, tmp_path):
    """A copy of a run to do harm to."""

    return lambda name: shutil.copytree(runs(name), tmp_path / "own")


def fedmask(*args):
    done = CliRunner().invoke(app, ["export", *map(str, args)])
    return done.exit_code, " ".join(done.output.split())


def blobs():
    test = data.load("tiny:blobs", "test")
    return torch.from_numpy(test.x), torch.from_numpy(test.y)


def accuracy(network, x, y):
    with torch.no_grad():
        return float((network(x).argmax(1) == y).float().mean())


# What is exported


@pytest.mark.parametrize("name", sorted(set(RUNS) - ON_DEVICES))
def test_the_network_is_the_one_that_the_run_measured(name, runs, tmp_path):
    code, said = fedmask(runs(name), "--out", tmp_path / "net")
    assert code == 0, said
    last = json.loads((runs(name) / "metrics.jsonl").read_text().splitlines()[-1])
    x, y = blobs()
    program = torch.export.load(tmp_path / "net/model.pt2").module()
    if name != "personal":  # its server measures what nobody was told, and exports the mean
        assert last["accuracy_threshold"] > 0.5
        assert accuracy(program, x, y) == pytest.approx(last["accuracy_threshold"], abs=1e-6)
        assert float(cross_entropy(program(x), y)) == pytest.approx(last["loss"], rel=1e-4)
    plain = tiny.net()
    plain.load_state_dict(load_file(tmp_path / "net/model.safetensors"))
    assert torch.allclose(plain(x[:1]), program(x[:1]), atol=1e-5)  # any batch size
    report = json.loads((tmp_path / "net/report.json").read_text())
    assert report["batch"] == "any"
    assert report["networks"]["full"]["parameters"] == sum(p.numel() for p in plain.parameters())
    assert report["files"]["model.pt2"] == (tmp_path / "net/model.pt2").stat().st_size
    assert report["mask_bytes"] == (runs(name) / "mask.fedmask").stat().st_size
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == sorted({*artifacts.FILES} - {"model.onnx"})


@pytest.mark.parametrize("name", sorted(ON_DEVICES))
def test_a_devices_own_network(name, runs, tmp_path):
    code, said = fedmask(runs(name), "--out", tmp_path / "net")
    assert code == 1
    assert "add --client N" in said
    assert "found: 0, 1" in said
    x, y = blobs()
    seen = []
    for client in (0, 1):
        out = tmp_path / f"net{client}"
        code, said = fedmask(runs(name), "--out", out, "--client", client)
        assert code == 0, said
        assert json.loads((out / "report.json").read_text())["client"] == client
        seen.append(torch.export.load(out / "model.pt2").module()(x))
        assert accuracy(torch.export.load(out / "model.pt2").module(), x, y) > 0.5
    assert not torch.allclose(*seen, atol=1e-3)
    code, said = fedmask(runs(name), "--out", tmp_path / "net", "--client", 5)
    assert code == 1
    assert "no memory of device 5 of this run; found: 0, 1" in said
    assert not (tmp_path / "net").exists()


def test_a_moved_run_brings_its_devices_along(own, tmp_path):
    run = own("fedmask")
    told = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**told, "memory-dir": str(tmp_path / "gone")}))
    assert fedmask(run, "--out", tmp_path / "net", "--client", 1)[0] == 0


def test_a_damaged_memory_is_said(own, tmp_path):
    run = own("fedmask")
    for file in run.glob("memory/*/*.safetensors"):
        file.write_bytes(b"x")
    code, said = fedmask(run, "--out", tmp_path / "net", "--client", 1)
    assert code == 1
    assert "is not the memory of client 1" in said


def test_the_plan_is_the_strategys():
    config, settings = load_config(tiny.run_config(method="fedmask", prune=0.5, include="1.*", weights="seed:3"))
    model = models.backbone("tiny:net", config.weights_source, (8,), 3).build()
    lr = {"optimizer": config.optimizer, "lr": config.lr}
    strategy = MaskStrategy("fedmask", model, weights=AS_BUILT, include=("1.*",), seed=7, **lr, **settings)
    assert Plan.of(config, settings, strategy.plan.run).identity(b"8" * 8) == strategy.plan.identity(b"8" * 8)
    assert strategy.plan.identity(b"9" * 8) != strategy.plan.identity(b"8" * 8)


# Smaller networks


@pytest.mark.parametrize(("name", "client"), [("mpfl", None), ("pruning-fl", None), ("fedmask", 0)])
def test_slim(name, client, runs, tmp_path):
    who = () if client is None else ("--client", client)
    code, said = fedmask(runs(name), "--out", tmp_path / "net", "--slim", *who)
    assert code == 0, said
    report = json.loads((tmp_path / "net/report.json").read_text())
    full, slim = report["networks"]["full"], report["networks"]["slim"]
    for figure in ("parameters", "macs", "bytes"):
        assert slim[figure] < full[figure]
    assert 0 < slim["latency_ms"] < 1000
    assert report["differences"]["slim"] <= 1e-5
    x, _ = blobs()
    program = torch.export.load(tmp_path / "net/model.pt2").module()
    masked = export.read_run(runs(name), client=client).model
    assert torch.allclose(program(x), masked(x), atol=1e-4)
    state = load_file(tmp_path / "net/model.safetensors")
    assert sum(t.numel() for t in state.values()) == slim["parameters"]
    assert state["1.weight"].shape[0] == state["3.weight"].shape[1] < 32


@pytest.mark.parametrize("name", ["fedpm", "fedavg"])
def test_slim_refuses_where_nothing_can_go(name, runs, tmp_path):
    code, said = fedmask(runs(name), "--out", tmp_path / "net", "--slim")
    assert code == 1
    assert "nothing to cut" in said
    assert not (tmp_path / "net").exists()


# What is refused


def test_files_are_not_overwritten(runs, tmp_path):
    out = tmp_path / "net"
    assert fedmask(runs("fedavg"), "--out", out, "--onnx")[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    code, said = fedmask(runs("fedpm"), "--out", out)
    assert code == 1
    assert "--overwrite" in said
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert fedmask(runs("fedpm"), "--out", out, "--overwrite")[0] == 0
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "model.pt2", "report.json", "notes.txt"}
    assert (out / "model.safetensors").read_bytes() != before["model.safetensors"]
    code, said = fedmask(runs("fedpm"), "--out", out / "notes.txt")
    assert (code, "is a file" in said) == (1, True)


def test_wrong_folders(own, tmp_path):
    out = tmp_path / "net"
    assert "there is no config.json in it" in fedmask(tmp_path / "none", "--out", out)[1]
    run = own("fedpm")
    told = (run / "config.json").read_text()
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged: it is not a table"),
        (told.replace('"alpha"', '"alphabet"'), "unknown run-config key alphabet"),
        (told.replace("tiny:net", "tiny:nett"), "cannot import tiny:nett"),
        (told.replace("tiny:blobs", "tiny:blob"), "--data-dir gives its folder"),
    ):
        (run / "config.json").write_text(text)
        code, said = fedmask(run, "--out", out)
        assert (code, message in said) == (1, True), said
    (run / "config.json").write_text(told)
    (run / "mask.fedmask").unlink()
    code, said = fedmask(run, "--out", out)
    assert (code, "the run is not finished" in said) == (1, True)
    code, said = fedmask(run, "--out", out, "--client", 0)
    assert code == 1
    assert not out.exists()


@pytest.mark.parametrize("where", [0, 30, -1])
def test_a_damaged_frame(own, tmp_path, where):
    run = own("fedpm")
    raw = bytearray((run / "mask.fedmask").read_bytes())
    raw[where] ^= 1
    (run / "mask.fedmask").write_bytes(raw)
    code, said = fedmask(run, "--out", tmp_path / "net")
    assert (code, f"{run / 'mask.fedmask'}: " in said) == (1, True)


def test_the_frame_of_another_network(own, tmp_path):
    run = own("fedpm")
    told = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**told, "seed": 8}))
    code, said = fedmask(run, "--out", tmp_path / "net")
    assert (code, "is of another network than config.json describes" in said) == (1, True)


@pytest.mark.parametrize(
    "payload",
    [
        Payload(),
        Payload(dense={"weights": np.zeros(5, np.float32)}),
        Payload(dense={"mask": np.zeros(352, np.float32)}),
        Payload(dense={"other": np.zeros(5, np.float32)}),
    ],
)
def test_a_frame_that_is_no_result(own, tmp_path, payload):
    run = own("fedpm")
    digest = Frame.parse((run / "mask.fedmask").read_bytes()).digest
    (run / "mask.fedmask").write_bytes(pack(payload, digest=digest, round_=4, known=SideInfo((352,))))
    code, said = fedmask(run, "--out", tmp_path / "net")
    assert code == 1
    assert "which is no network" in said or "unexpected field" in said


def test_data_that_lies_elsewhere(own, tmp_path):
    run = own("fedavg")
    told = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**told, "data": "npz", "data-dir": str(tmp_path / "gone")}))
    code, said = fedmask(run, "--out", tmp_path / "net")
    assert (code, "--data-dir" in said) == (1, True)
    x, y = tiny.blobs("test", "")
    (tmp_path / "moved").mkdir()
    np.savez(tmp_path / "moved/test.npz", x=x, y=y)
    assert fedmask(run, "--out", tmp_path / "net", "--data-dir", tmp_path / "moved")[0] == 0


def test_a_client_of_a_method_with_one_network(runs, tmp_path):
    code, said = fedmask(runs("fedavg"), "--out", tmp_path / "net", "--client", 0)
    assert (code, "leave out --client" in said) == (1, True)


def test_missing_packages_are_named(runs, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(artifacts, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    code, said = fedmask(runs("fedavg"), "--out", tmp_path / "net", "--onnx")
    assert code == 1
    assert "ONNX needs onnxruntime: pip install 'fedmask-flwr[export]'" in said
    assert fedmask(runs("fedavg"), "--out", tmp_path / "net")[0] == 0


def test_own_data_and_network_in_the_working_folder(runs, tmp_path, monkeypatch):
    """The console script does not have the working folder on its path, and leaves the path as it was."""
    shutil.copy(tiny.ROOT / "tests/tiny.py", tmp_path / "tiny.py")
    code = "from fedmask_flwr.cli import app; import sys; sys.path.remove(''); app()"
    command = [sys.executable, "-c", code, "export", str(runs("fedavg")), "--out", "net"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "net/model.pt2").exists()


def test_nothing_of_flower_is_needed():
    code = "import sys, fedmask_flwr.export; print({'flwr', 'fedmask_flwr.flower'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
