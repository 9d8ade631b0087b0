from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedmask_flwr import __version__, data, show
from fedmask_flwr.checkpoint import save_state
from fedmask_flwr.cli import app
from fedmask_flwr.config import scalar
from fedmask_flwr.simulation import SimulationError, launch, reaper, sandbox, stage
from fedmask_flwr.wire import Field, Frame, Payload, SideInfo, codec, pack, pack_bits

LINE = {
    "round": 1, "accuracy_sampled": 0.25, "accuracy_threshold": 0.5, "accuracy_expected": 0.75, "loss": 1.0,
    "uplink_bytes": 4000, "downlink_bytes": 90_000, "uplink_bpp": 0.125, "downlink_bpp": 1.0,
    "clients_ok": 2, "clients_failed": 1, "seconds": 3.5,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """Stand in for the runner; it writes what a server would."""
    got = []

    def simulate(config, *, num_clients, out, on_round, cpus_per_client, gpus_per_client):
        got.append((dict(config), num_clients, out))
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps({**stage.defaults(), **config, "out": str(out)}))
        rounds = config.get("num-server-rounds", 20)
        for number in range(1, rounds + 1):
            row = {**LINE, "round": number}
            with (out / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            on_round(row)
        (out / "checkpoint.safetensors").write_bytes(b"x")
        (out / "mask.fedmask").write_bytes(b"x")

    monkeypatch.setattr(launch, "simulate", simulate)
    return got


def fedmask(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def said(result):
    return " ".join(result.output.split())


def test_version_and_help():
    assert fedmask("--version").output == f"fedmask {__version__}\n"
    assert fedmask("run", "--help").exit_code == 0
    assert "--method" in fedmask("run", "--help").output
    assert fedmask("nonsense").exit_code == 2


def test_start_up_is_light():
    code = "import sys, fedmask_flwr.cli; print(sorted({'torch', 'flwr', 'numpy', 'pydantic'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# run: options


def test_only_what_was_given_goes_into_the_run_config(tmp_path, calls):
    assert fedmask("run", "--out", tmp_path / "a").exit_code == 0
    told = {"clients": 10, "memory-dir": str(tmp_path / "a/memory")}
    assert calls == [(told, 10, tmp_path / "a")]


def test_options_and_their_keys(tmp_path, calls, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = """--method fedpm --data digits --data-dir d --model mlp --rounds 2 --local-epochs 1 --batch-size 8
    --lr 1 --partition dirichlet --alpha 2 --seed 3 --codec rice --clients 3 --out b
    -c min-nodes=3 -c weights=seed:4"""
    done = fedmask("run", *words.split())
    assert done.exit_code == 0, done.output
    config, clients, out = calls[0]
    assert (clients, out) == (3, tmp_path / "b")
    assert config == {
        "method": "fedpm", "data": "digits", "data-dir": str(tmp_path / "d"), "model": "mlp",
        "num-server-rounds": 2, "local-epochs": 1, "batch-size": 8, "learning-rate": 1.0,
        "partition": "dirichlet", "alpha": 2.0, "seed": 3,
        "codec": "rice", "min-nodes": 3, "weights": "seed:4", "clients": 3,
        "memory-dir": str(tmp_path / "b/memory"),
    }  # fmt: skip
    assert isinstance(config["alpha"], float)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3), ("3", 1.0, 3.0), ("3", "x", "3"), ("true", False, True), ("0.5", 0.5, 0.5),
        ("a b", "x", "a b"), ("'a'", "x", "a"), ('"3"', "x", "3"), ("1e-3", 0.5, 1e-3), ("seed:7", None, "seed:7"),
    ],
)  # fmt: skip
def test_values(text, default, value):
    got = scalar("k", text, default)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "learning-rat=1"], "learning-rat. Did you mean learning-rate"),
        (["--rounds", "0"], "num-server-rounds"),
        (["--partition", "idd"], "'iid', 'dirichlet', 'classes' or 'group'"),
        (["--codec", "zip"], "use one of auto"),
        (["--method", "fedprm"], "fedpm"),
        (["-c", "alpha"], "write KEY=VALUE"),
        (["-c", "alpha=[1]"], "one string, number or true/false"),
        (["-c", "out=/x"], "use --out"),
        (["-c", "clients=4"], "use --clients"),
        (["--method", "fedpm", "-c", "kappa=1"], "unknown run-config key kappa"),
        (["--model", "no_such_module:net"], "cannot import no_such_module:net"),
        (["-c", "include=layers.*"], "pattern 'layers.*' matches no parameter"),
        (["-c", "weights=file:none.pt#sha256=" + 64 * "0"], "none.pt: copy the file with SHA-256"),
        (["--clients", "1"], "add -c min-nodes=1"),
        (["--clients", "1401"], "1401 clients cannot share 1400 training rows"),
        (["--data", "npz"], "--data-dir"),
        (["--data", "minst"], "digits, mnist"),
        (["--clients", "x"], "not a valid integer"),
        (["-c", "device=gpu"], "device is 'gpu': use auto, cpu, or cuda"),
        (["--model", "mlp(hidden=300,0)"], "an mlp of [64, 300, 0] inputs"),
        (["--model", "made"], "0s and 1s"),
        (["-c", "seed=1\nrounds=2"], "seed = '1"),
    ],
)
def test_wrong_options(tmp_path, calls, words, message):
    done = fedmask("run", "--out", tmp_path / "a", *words)
    assert done.exit_code == 2
    assert message in said(done)
    assert not calls
    assert not (tmp_path / "a").exists()


def npz(folder, name, y, shape=(4,), **more):
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", x=np.ones((len(y), *shape), np.float32), y=np.array(y), **more)


def test_a_folder_of_npz_is_one_network(tmp_path, calls):
    """Whichever split lacks the last class, server and devices build the same."""
    for n, (train, test) in enumerate([([0, 1, 2, 3], [0, 1, 2]), ([0, 1, 2], [0, 3, 3]), ([0, 3, 1], [0, 1, 3])]):
        folder = tmp_path / f"data{n}"
        npz(folder, "train", train)
        npz(folder, "test", test)
        assert data.form("npz", "train", str(folder)) == data.form("npz", "test", str(folder)) == ((4,), 4)
    npz(folder, "test", [0, 1], num_classes=6)
    assert data.form("npz", "train", str(folder)) == ((4,), 6)
    (folder / "test.npz").unlink()
    assert data.form("npz", "train", str(folder)) == ((4,), 4)
    folder = tmp_path / "wide"
    npz(folder, "train", [0, 1, 2])
    npz(folder, "test", [0, 1, 2], (5,))
    words = ("--data", "npz", "--data-dir", folder, "--clients", "2")
    done = fedmask("run", "--out", tmp_path / "a", *words)
    assert (done.exit_code, calls) == (2, [])
    assert "examples of test.npz have shape (5,), those of" in said(done)
    (folder / "train.npz").write_bytes(b"PK")
    assert "train.npz is not an .npz file of plain arrays" in said(fedmask("run", "--out", tmp_path / "a", *words))


def test_a_checkpoint_is_named_from_where_the_run_is_started(tmp_path, calls, monkeypatch):
    from safetensors.torch import save_file

    from fedmask_flwr.models import mlp

    monkeypatch.chdir(tmp_path)
    save_file(mlp((1, 8, 8), 10).state_dict(), "net.safetensors")
    name = hashlib.sha256(Path("net.safetensors").read_bytes()).hexdigest()
    done = fedmask("run", "--out", "a", "-c", f"weights=file:net.safetensors#sha256={name}")
    assert done.exit_code == 0, done.output
    assert calls[0][0]["weights"] == f"file:{tmp_path}/net.safetensors#sha256={name}"


def test_the_installed_command_finds_a_module_in_the_working_folder(tmp_path):
    """Its own folder is first on the path, not this one; it gets as far as the checks go."""
    (tmp_path / "mine.py").write_text("from fedmask_flwr.models import mlp as build\n")
    command = [str(sandbox.scripts() / "fedmask"), "run", "--model", "mine:build", "--clients", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "add -c min-nodes=1" in done.stderr
    wrong = subprocess.run([*command, "-c", "min-nodes=1", "--model", "mine:other"], capture_output=True, text=True,
                           cwd=tmp_path, check=False)  # fmt: skip
    assert "mine:other" in wrong.stderr
    assert "No module" not in wrong.stderr


def test_an_unfinished_run_of_another_version_is_resumed(tmp_path, calls):
    """It lacks keys that came later, and other methods' keys are none of its business."""
    unfinished(tmp_path / "a")
    config = tmp_path / "a/config.json"
    written = json.loads(config.read_text())
    later = ("mu", "server-threads", "kappa-min")
    config.write_text(json.dumps({k: v for k, v in written.items() if k not in later} | {"tau": 0.3}))
    assert fedmask("run", "--out", tmp_path / "a").exit_code == 0
    config.write_text(json.dumps(written | {"kappa": 0.3}))
    (tmp_path / "a/mask.fedmask").unlink()
    assert "kappa: 0.3 then, 0.8 now" in said(fedmask("run", "--out", tmp_path / "a"))


def test_what_others_wrote_stays_text(tmp_path):
    frame = Frame(b"12345678", 1, (Field("a", 1, 8, b"\x01"),), {"\x1b]0;x\x07": "\x1b[2J"})
    (tmp_path / "f").write_bytes(frame.to_bytes())
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "f")], color=True)
    assert "\x1b]" not in done.output
    assert "\x1b[2J" not in done.output
    assert "meta \\x1b]0;x\\x07" in done.output


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_folder_that_may_not_be_read(command, monkeypatch, tmp_path):
    def refused(self, **_):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", refused)
    done = fedmask(command, tmp_path)
    assert done.exit_code in (1, 2)
    assert "Permission denied" in said(done)


# run: the folder


@dataclass(frozen=True)
class Votes:
    ones: np.ndarray


def unfinished(out, rounds=20):
    out.mkdir()
    (out / "config.json").write_text(
        json.dumps({**stage.defaults(), "num-server-rounds": rounds, "clients": 10, "out": "elsewhere"})
    )
    save_state(out / "checkpoint.safetensors", Votes(np.zeros(3)), {"round": 1})
    (out / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")


def test_a_disk_that_is_full_at_the_end_is_a_failure(tmp_path, calls, monkeypatch):
    simulate = launch.simulate

    def without_room(*args, out, **kwargs):
        simulate(*args, out=out, **kwargs)
        (out / "mask.fedmask").unlink()

    monkeypatch.setattr(launch, "simulate", without_room)
    result = fedmask("run", "--out", tmp_path / "a")
    assert result.exit_code == 1
    assert "mask.fedmask was not saved: free the disk" in said(result)


def test_an_unfinished_run_is_resumed(tmp_path, calls):
    unfinished(tmp_path / "a")
    done = fedmask("run", "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert "resuming the unfinished run after round 1" in said(done)


def test_a_run_without_a_complete_round_binds_nobody(tmp_path, calls):
    unfinished(tmp_path / "a")
    (tmp_path / "a" / "checkpoint.safetensors").unlink()
    assert fedmask("run", "--out", tmp_path / "a", "--seed", "8").exit_code == 0


@pytest.mark.parametrize("other", [["--seed", "8"], ["--clients", "5"]])
def test_another_run_is_not_resumed(tmp_path, calls, other):
    unfinished(tmp_path / "a")
    done = fedmask("run", "--out", tmp_path / "a", *other)
    assert done.exit_code == 2
    assert "--overwrite" in said(done)
    assert not calls


def test_a_finished_run_is_refused_and_overwritten_on_request(tmp_path, calls):
    args = "run", "--out", tmp_path / "a", "--rounds", "2"
    assert fedmask(*args).exit_code == 0
    (tmp_path / "a" / "notes.txt").write_text("mine")
    done = fedmask(*args)
    assert done.exit_code == 2
    assert "finished run of 2 rounds; use --overwrite" in said(done)
    assert len(calls) == 1
    done = fedmask(*args, "--overwrite", "--seed", "8")
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_a_file_or_held(tmp_path, calls):
    (tmp_path / "file").write_text("")
    assert fedmask("run", "--out", tmp_path / "file").exit_code == 2
    unfinished(tmp_path / "a")
    with (tmp_path / "a" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for extra in ([], ["--overwrite"]):
            done = fedmask("run", "--out", tmp_path / "a", *extra)
            assert done.exit_code == 2
            assert "another run is writing" in said(done)
    assert (tmp_path / "a" / "metrics.jsonl").exists()


# run: what is shown


def test_rows_and_summary(tmp_path, calls):
    done = fedmask("run", "--out", tmp_path / "a", "--rounds", "2", "--clients", "3")
    assert "deltamask on digits, mlp, weights seed: 3 clients, 2 rounds" in said(done)
    assert "1 0.2500 0.5000 0.7500 2 kB 30 kB 0.1250 1.0000 2 1 3.5" in said(done)
    assert (
        "accuracy sampled 0.2500, threshold 0.5000, expected 0.7500; mean uplink 0.1250 bits per parameter; "
        "total 8 kB up, 180 kB down"
    ) in said(done)


def test_a_failed_run_exits_1(tmp_path, monkeypatch):
    def fails(*_args, **_kwargs):
        raise SimulationError("Flower says finished:failed: because\nthe log")

    monkeypatch.setattr(launch, "simulate", fails)
    done = fedmask("run", "--out", tmp_path / "a")
    assert done.exit_code == 1
    assert "finished:failed: because the log" in said(done)


def test_ctrl_c_exits_130(tmp_path, monkeypatch):
    def stops(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "simulate", stops)
    done = fedmask("run", "--out", tmp_path / "a")
    assert done.exit_code == 130
    assert "the same command resumes" in said(done)


def test_table_in_a_terminal():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, height=12)
    with show.RoundTable(console, 30) as table:
        for number in range(1, 31):
            table.add({"round": number, "clients_ok": 2})
        live = console.render_str("")
        assert table._table(4).row_count == 4
        assert "round 30 of 30" in table._progress().plain
    assert live is not None
    assert table._table(30).row_count == 30
    assert "30" in file.getvalue()


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (12_500, "12.5 kB"), (3.2e9, "3.2 GB"), (5e12, "5 TB")],
)
def test_human_bytes(n, text):
    assert show.human_bytes(n) == text


def test_plot_curve_writes_a_png_without_pyplot(tmp_path):
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from fedmask_flwr.show import plot_curve
        row = {"accuracy_sampled": .1, "accuracy_threshold": .2, "uplink_bytes": 1000, "downlink_bytes": 10**6}
        plot_curve([dict(row, round=r, accuracy_threshold=r / 100) for r in range(99)], Path(sys.argv[1]))
        plot_curve([], Path(sys.argv[2]))
        assert "matplotlib.pyplot" not in sys.modules
    """)
    out = [tmp_path / "a.png", tmp_path / "b.png"]
    subprocess.run([sys.executable, "-W", "error", "-c", code, *map(str, out)], check=True)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in out)
    assert out[0].stat().st_size > out[1].stat().st_size


# inspect


def mask_frame(name="auto"):
    bits = np.zeros(300, np.bool_)
    bits[::4] = True
    payload = Payload(bits={"mask": pack_bits(bits)}, dense={"w": np.ones(5, np.float32)}, meta={"flips": 0.5})
    return pack(payload, digest=b"12345678", round_=9, known=SideInfo((300,)), codecs={"bits": name})


@pytest.mark.parametrize("name", ["bits", "rice", "entropy", "rice+zstd"])
def test_inspect(tmp_path, name):
    path = tmp_path / "mask.fedmask"
    path.write_bytes(mask_frame(name))
    done = fedmask("inspect", path)
    assert done.exit_code == 0, done.output
    body = len(Frame.parse(mask_frame(name)).fields[0].body)
    text = said(done)
    assert "model 3132333435363738 round 9 meta flips 0.5" in text
    assert f"mask {name} 300 {body} {8 * body / 300:.4f} 0.2500" in text
    assert "w float32 5 20 32.0000 -" in text


def test_inspect_a_message_of_a_hostile_length(tmp_path):
    rice, _ = codec("rice")
    path = tmp_path / "f"
    for numel in (1 << 30, 1 << 60):
        path.write_bytes(Frame(b"12345678", 1, (Field("delta", rice.id, numel, b"\xff\xff"),), {}).to_bytes())
        done = fedmask("inspect", path)
        assert done.exit_code == 0, done.output
        assert f"delta rice {numel} 2 " in said(done)


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b"X" + b[1:], lambda b: b[:-3] + b"abc"]
)
def test_inspect_malformed(tmp_path, damage):
    path = tmp_path / "mask.fedmask"
    path.write_bytes(damage(mask_frame()))
    done = fedmask("inspect", path)
    assert done.exit_code == 1
    assert done.output.startswith(f"{path}: ")
    assert len(done.output.splitlines()) == 1


def test_inspect_a_body_that_does_not_decode(tmp_path):
    rice, _ = codec("rice")
    path = tmp_path / "f"
    frame = Frame(b"12345678", 1, (Field("mask", rice.id, 300, b"\xff" * 9),), {})
    path.write_bytes(frame.to_bytes())
    assert said(fedmask("inspect", path)).endswith("?")
    frame = Frame(b"12345678", 1, (Field("mask", 63, 300, b"\xff" * 9),), {})
    path.write_bytes(frame.to_bytes())
    assert "unknown codec" in fedmask("inspect", path).output
    assert fedmask("inspect", tmp_path / "none").exit_code == 1


# Flower

OWN = """
import numpy as np
def load(split, data_dir):
    if data_dir:
        raise ValueError("told to fail")
    rng = np.random.default_rng(0)
    return rng.random((40, 2, 2), np.float32), np.arange(40) % 2
"""


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.other_flower
def test_run_with_flower(tmp_path, monkeypatch):
    token = os.urandom(16).hex()
    monkeypatch.setattr(sandbox.secrets, "token_hex", lambda _n: token)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data_here.py").write_text(OWN)
    args = "run", "--data", "own_data_here:load", "--clients", "2", "--rounds", "2", "--local-epochs", "1"
    done = fedmask(*args, "--out", "a")
    assert done.exit_code == 0, done.output
    out = Path("a")
    assert [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    for name in ("config.json", "checkpoint.safetensors", "mask.fedmask", "curve.png", "flower.log"):
        assert (out / name).stat().st_size > 0
    assert fedmask("inspect", out / "mask.fedmask").exit_code == 0
    done = fedmask(*args, "--out", "b", "--data-dir", "x")
    assert done.exit_code == 1
    assert "ValueError: told to fail" in done.output
    assert reaper.tagged(token, "") == []
