"""``fedmask doctor``: each fault is found, named, and comes with its remedy."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import stat
import time

import numpy as np
import pytest
import servers
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from fedmask_flwr.checks import (
    CHECKS,
    Asked,
    Check,
    Finding,
    base,
    cgroup,
    content,
    disks,
    endpoint,
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
from fedmask_flwr.memory import DeviceMemory
from fedmask_flwr.methods import resolve
from fedmask_flwr.setting import network as build

TINY = (("data", "tiny:blobs"), ("model", "tiny:net"))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(peer, "SECONDS", 0.5)
    monkeypatch.setattr(network, "SECONDS", 0.7)
    trial.trial.cache_clear()


def at(port, host="127.0.0.1", **asked):
    return Asked(superlink=f"{host}:{port}", **asked)


def told(finding, status, *words):
    assert finding.status == status, finding
    for word in words:
        assert word in f"{finding.seen} -> {finding.remedy}"
    assert bool(finding.remedy) == (status in ("warn", "fail"))


# the registry


def checks(**looks):
    return [Check(name.replace("_", " "), look, (), 0.3) for name, look in looks.items()]


def test_a_check_that_raises_is_a_failure():
    def broken(_asked):
        raise KeyError("x")

    def leaves(_asked):
        raise SystemExit(3)

    first, second = examine(Asked(), checks(broken=broken, leaves=leaves))
    told(first, "fail", "KeyError: 'x'", "broken, line")
    told(second, "fail", "SystemExit: 3")


def test_a_check_that_hangs_is_given_up():
    began = time.monotonic()
    slow, quick = examine(Asked(), checks(slow=lambda _a: time.sleep(2), quick=lambda _a: base.ok("well")))
    told(slow, "fail", "no answer within 0.3 s")
    told(quick, "ok", "well")
    assert time.monotonic() - began < 1.5


@pytest.mark.parametrize(("status", "then"), [("ok", "ok"), ("warn", "ok"), ("fail", "skip"), ("skip", "skip")])
def test_what_a_check_needs(status, then):
    first = Check("a", lambda _a: Finding("", status, "seen"), (), 1)
    second = Check("b", lambda _a: base.ok("well"), ("a",), 1)
    assert [f.status for f in examine(Asked(), [first, second])] == [status, then]


def test_registered_in_order():
    names = list(CHECKS)
    assert names[0] == "versions"
    for one in CHECKS.values():
        assert all(names.index(need) < names.index(one.name) for need in one.needs)


@pytest.mark.parametrize("text", ["host", "host:", ":9092", "host:0", "host:65536", "host:x", "https://host:1"])
def test_endpoint_refuses(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        endpoint(text)


def test_endpoint():
    assert endpoint("a.b:9092") == ("a.b", 9092)
    assert endpoint("[::1]:1") == ("::1", 1)


# software


def test_versions():
    told(software.versions(Asked()), "ok", "flwr ", "torch ", "grpcio ", "Python ")


def test_versions_out_of_range(monkeypatch):
    monkeypatch.setattr(
        software, "requirements", lambda: [("flwr", "<1.0"), ("no-such-thing", ">=2"), ("numpy", ">=1")]
    )
    told(
        software.versions(Asked()), "fail", "no-such-thing missing", "needed: flwr<1.0, no-such-thing>=2",
        "pip install 'flwr<1.0' 'no-such-thing>=2'",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("version", "kind", "port", "wrong"),
    [("1.39.0", "gRPC", 9092, 8000), ("1.40.1", "HTTP", 8000, 9092), ("1.41.0", "HTTP", 8000, 9092)],
)
def test_transport(monkeypatch, version, kind, port, wrong):
    monkeypatch.setattr(software.metadata, "version", lambda _name: version)
    told(software.transport(at(port)), "ok", kind, str(port))
    told(software.transport(at(wrong)), "warn", kind, f"port {wrong} is what")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_FLEET_API", "1")
    assert software.speaks() == "grpc"


def test_import_seconds():
    total, packages = software.import_seconds("json.decoder")
    assert 0 < packages["json"] < total < 30
    assert list(packages.values()) == sorted(packages.values(), reverse=True)


def test_import_time_over_budget_or_broken(monkeypatch):
    monkeypatch.setattr(software, "import_seconds", lambda: (99.0, {"torch": 90.0, "flwr": 5.0}))
    told(software.imports(Asked()), "warn", "99.0 s", "torch 90.0, flwr 5.0")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="No module named 'no_such_module'"):
        software.import_seconds("no_such_module")


# the way to the SuperLink


def test_reach():
    told(network.reach(Asked()), "skip")
    with servers.saying() as port:
        told(network.reach(at(port)), "ok", "127.0.0.1")
    told(network.reach(at(servers.closed_port())), "fail", "nothing listens", "start the SuperLink")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "leads nowhere"),
        (TimeoutError(), "a firewall"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
    ],
)
def test_reach_otherwise(monkeypatch, error, words):
    def refuse(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(network.socket, "create_connection", refuse)
    told(network.reach(at(1)), "fail", words)


@pytest.fixture(scope="module")
def ca(tmp_path_factory):
    return servers.Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(autouse=True)
def _grpc_days(monkeypatch):
    monkeypatch.setattr(network, "speaks", lambda: "grpc")


def tls_of(ca, host="127.0.0.1", alpn=("h2",), trust=None, **server):
    with servers.tls(ca.server(**server), alpn) as port:
        return network.tls(at(port, host, root_certificates=trust or ca.path))


def test_tls_well(ca):
    told(tls_of(ca), "ok", "CN=test CA", "localhost, 127.0.0.1", "days left")
    told(tls_of(ca, "localhost"), "ok")


def test_tls_ends_soon(ca):
    told(tls_of(ca, last=12), "warn", " 12 days left", "renew")


def test_tls_expired(ca):
    told(tls_of(ca, first=-9, last=-3), "fail", "CN=superlink expired 3 days ago", "clock is right")


def test_tls_not_yet_valid(ca):
    told(tls_of(ca, first=2), "fail", "starts at", "set this machine's clock")


def test_tls_other_name(ca):
    told(tls_of(ca, names=("other.example",)), "fail", "for other.example, not for 127.0.0.1")
    told(tls_of(ca, "localhost", names=("other.example",)), "fail", "for other.example, not for localhost")
    told(tls_of(ca, names=()), "fail", "no name at all")


def test_tls_wrong_ca(ca, tmp_path):
    other = servers.Authority(tmp_path / "a", "another CA")
    told(tls_of(ca, trust=other.path), "fail", "wrong CA", "issued by CN=test CA", "holds CN=another CA")
    again = servers.Authority(tmp_path / "b")
    told(tls_of(ca, trust=again.path), "fail", "wrong CA", "a CA of that name, but with another key")


def test_tls_expired_ca(tmp_path):
    old = servers.Authority(tmp_path, "old CA", last=-2)
    told(tls_of(old), "fail", "CN=old CA expired 2 days ago")


def test_tls_that_is_not_grpc(ca):
    told(tls_of(ca, alpn=()), "warn", "does not speak HTTP/2")


def test_tls_without_a_ca_given(ca):
    with servers.tls(ca.server()) as port:
        told(network.tls(at(port)), "fail", "does not trust CN=test CA", "--root-certificates")


def test_tls_no_certificates_in_the_file(ca, tmp_path):
    empty = tmp_path / "x.pem"
    for content_ in (None, b"", b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"):
        if content_ is not None:
            empty.write_bytes(content_)
        told(network.tls(at(1, root_certificates=empty)), "fail", "is no file of certificates", "ca.crt")


def test_plaintext_servers(ca):
    with servers.grpc_server() as port:
        told(network.tls(at(port)), "warn", "gRPC without TLS", "--ssl-certfile")
        told(network.tls(at(port, root_certificates=ca.path)), "fail", "gRPC without TLS", "--ssl-certfile")
    with servers.saying(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        told(network.tls(at(port)), "warn", "HTTP without TLS")
    with servers.saying(b"SSH-2.0-OpenSSH_9\r\n") as port:
        told(network.tls(at(port)), "fail", "neither TLS, nor gRPC, nor HTTP")
    with servers.saying() as port:
        told(network.tls(at(port)), "fail", "neither TLS")


def test_channel(ca):
    with servers.grpc_server() as port:
        told(network.channel(at(port)), "ok", "without TLS ready")
    with servers.grpc_server(ca.server()) as port:
        asked = at(port, root_certificates=ca.path)
        told(network.tls(asked), "ok")
        told(network.channel(asked), "ok", "with TLS ready")
    with servers.saying() as port:
        told(network.channel(at(port)), "fail", "not ready within 0.7 s", "9092")


def http(date, status=b"200 OK"):
    return b"HTTP/1.1 " + status + b"\r\nDate: " + date.encode() + b"\r\nContent-Length: 0\r\n\r\n"


def test_http_channel_and_clock(monkeypatch):
    monkeypatch.setattr(network, "speaks", lambda: "http")

    def date(off):
        return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() - off))

    with servers.saying(http(date(0))) as port:
        told(network.channel(at(port)), "ok", "answered 200")
        told(network.clock(at(port)), "ok", "the SuperLink's")
    with servers.saying(http(date(0), b"404 Not Found")) as port:
        told(network.channel(at(port)), "fail", "answered 404", "8000")
    with servers.saying(http(date(60))) as port:
        told(network.clock(at(port)), "fail", "ahead of the SuperLink's", "timedatectl")
    with servers.saying(http(date(-3600))) as port:
        told(network.clock(at(port)), "fail", "behind the SuperLink's")


def test_clock(monkeypatch, tmp_path, ca):
    monkeypatch.setattr(network, "_disciplined", lambda: True)
    told(network.clock(Asked()), "ok", "time service keeps it")
    monkeypatch.setattr(network, "_disciplined", lambda: False)
    told(network.clock(Asked()), "warn", "no time service")
    (tmp_path / "metrics.jsonl").write_text("")
    told(network.clock(Asked(run=tmp_path)), "warn", "after metrics.jsonl of the run was written")
    future = time.time() + 3600
    os.utime(tmp_path / "metrics.jsonl", (future, future))
    told(network.clock(Asked(run=tmp_path)), "fail", "s before metrics.jsonl of the run was written", "timedatectl")
    with servers.tls(ca.server(first=2)) as port:
        told(network.clock(at(port)), "fail", "before the server's certificate starts")
    with servers.tls(ca.server()) as port:
        told(network.clock(at(port)), "warn", "the SuperLink does not tell its time")


# the machine


def files(root, **texts):
    for path, text in texts.items():
        file = root / path.replace("__", "/").replace("_dot_", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_cgroup_2(tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    files(
        tmp_path / "fs", memory_dot_max="max\n", a__memory_dot_max="1000\n", a__memory_dot_current="900\n",
        a__b__memory_dot_max="2000\n", a__b__memory_dot_current="100\n", a__b__cpu_dot_max="50000 100000\n",
        a__cpu_dot_max="max 100000\n",
    )  # fmt: skip
    (tmp_path / "fs/a/memory.stat").write_text("anon 5\ninactive_file 300\n")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own") == cgroup.Limits(1000, 400, 0.5)


def test_cgroup_1(tmp_path):
    (tmp_path / "own").write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n0::/\n")
    memory, cpu = tmp_path / "fs/memory/docker/x", tmp_path / "fs/cpu,cpuacct/docker/x"
    for folder in (memory, cpu):
        folder.mkdir(parents=True)
    (memory.parents[1] / "memory.limit_in_bytes").write_text("9223372036854771712")
    (memory / "memory.limit_in_bytes").write_text("5000")
    (memory / "memory.usage_in_bytes").write_text("4000")
    (cpu / "cpu.cfs_quota_us").write_text("25000")
    (cpu / "cpu.cfs_period_us").write_text("100000")
    (cpu.parent / "cpu.cfs_quota_us").write_text("-1")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own") == cgroup.Limits(5000, 1000, 0.25)


def test_cgroup_of_a_container_and_none(tmp_path):
    """Inside a container the path of the outside is told, and only the root is there."""
    (tmp_path / "own").write_text("4:memory:/docker/x\n")
    (tmp_path / "fs/memory").mkdir(parents=True)
    (tmp_path / "fs/memory/memory.limit_in_bytes").write_text("7000")
    assert cgroup.limits(tmp_path / "fs", tmp_path / "own").memory == 7000
    assert cgroup.limits(tmp_path / "none", tmp_path / "none") == cgroup.Limits()


def test_free_memory(tmp_path):
    (tmp_path / "m").write_text("MemTotal: 9 kB\nMemAvailable:   2 kB\n")
    assert cgroup.free_memory(tmp_path / "m") == 2048
    assert cgroup.free_memory(tmp_path / "none") == math.inf
    assert 0 < cgroup.free_memory() < math.inf


STAGES = {
    "torch": {"version": "2.8", "threads": 4, "cuda": "", "built": "", "product": 1.0},
    "client": {"anonymous": 200_000_000, "mapped": 100_000_000},
    "data": {"name": "x", "shape": [8], "classes": 3, "examples": {"train": 5, "test": 4}},
    "network": {
        "digest": "0123456789abcdef", "named": "mlp, weights seed:7", "parameters": 2_000_000, "masked": 1_900_000,
        "activations": 8_000_000,
    },
}  # fmt: skip


@pytest.fixture
def stages(monkeypatch):
    got = {name: dict(stage) for name, stage in STAGES.items()}
    for room in (machine, content):
        monkeypatch.setattr(room, "trial", lambda _asked: got)
    return got


@pytest.mark.parametrize(("left", "status"), [(500e6, "ok"), (400e6, "warn"), (340e6, "fail")])
def test_memory(monkeypatch, stages, left, status):
    monkeypatch.setattr(machine.cgroup, "limits", lambda: cgroup.Limits(512e6, left, math.inf))
    told(machine.memory(Asked()), status, "of a limit of 512 MB", "2000000 parameters 140 MB", "about 348 MB")


def test_memory_of_a_machine_and_of_a_killed_process(monkeypatch, stages):
    monkeypatch.setattr(machine.cgroup, "limits", cgroup.Limits)
    monkeypatch.setattr(machine.cgroup, "free_memory", lambda: 100e6)
    told(machine.memory(Asked()), "fail", "100 MB left;")
    stages["network"] = stages["client"] = {"error": "the process ended here (signal 9)"}
    told(machine.memory(Asked()), "fail", "signal 9", "700 MB")


@pytest.mark.parametrize(
    ("asked", "quota", "omp", "status", "words"),
    [
        ({}, math.inf, None, "ok", "1 thread a client"),
        ({"threads": 4}, 0.5, "1", "warn", "set threads to 1"),
        ({}, 0.5, "4", "warn", "OMP_NUM_THREADS=1"),
        ({}, 0.5, None, "warn", "start a thread for each of 4 processors"),
        ({"threads": 4, "device": "auto"}, math.inf, "4", "ok", "OMP_NUM_THREADS 4"),
        ({"device": "cuda"}, math.inf, None, "fail", "device is cuda"),
    ],
)
def test_threads(monkeypatch, stages, asked, quota, omp, status, words):
    monkeypatch.setattr(machine.cgroup, "limits", lambda: cgroup.Limits(processors=quota))
    monkeypatch.setattr(machine.cgroup, "cores", lambda: 4)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    told(machine.threads(Asked(told=tuple(asked.items()))), status, words)


def test_a_torch_that_dies(stages):
    stages["torch"] = {"error": "the process ended here (signal 4)"}
    told(machine.threads(Asked()), "fail", "signal 4", "arm64")


# disks


def test_disk(tmp_path, monkeypatch):
    told(disks.writable(tmp_path), "ok", "fsync works")
    told(disks.writable(tmp_path / "a/b"), "ok", f"to be made in {tmp_path}")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    told(disks.writable(tmp_path / "file/x"), "fail", "is a file")
    told(disks.run_disk(Asked()), "skip")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert disks.memory_folder(Asked()) == tmp_path / "fedmask-flwr"
    assert disks.memory_folder(Asked(told=(("memory-dir", "x"),))).name == "x"


def test_disk_read_only(tmp_path):
    told(disks.writable(disks.Path("/proc/self")), "fail", "takes no writes", "own the folder")


def test_disk_full(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disks.os, "fsync", full)
    told(disks.writable(tmp_path), "fail", "No space left on device", "free the disk")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("megabytes", "inodes", "status", "words"),
    [(10, 9_000, "fail", "checkpoint"), (100, 9_000, "warn", "comfortable"), (10**6, 3, "fail", "inodes")],
)
def test_disk_nearly_full(tmp_path, monkeypatch, megabytes, inodes, status, words):
    free = megabytes * 1000
    state = os.statvfs_result((4096, 1000, 10**9, free, free, 10**6, inodes, inodes, 0, 255))
    monkeypatch.setattr(disks.os, "statvfs", lambda _path: state)
    told(disks.writable(tmp_path), status, words)


def test_device_memory(tmp_path):
    asked = Asked(memory_dir=tmp_path)
    told(disks.remembered(asked), "skip", "no device's memory")
    for client in (0, 1):
        for round_ in (1, 2):
            DeviceMemory(tmp_path, "ab12", client).keep(round_, {"m": np.arange(9)})
    told(disks.remembered(asked), "ok", "4 generations of 2 clients in 1 runs")
    newest, oldest = tmp_path / "ab12/0.000002.safetensors", tmp_path / "ab12/0.000001.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    told(disks.remembered(asked), "warn", "ab12/0.000002", "an older generation stands in")
    oldest.write_bytes((tmp_path / "ab12/1.000001.safetensors").read_bytes())
    told(disks.remembered(asked), "fail", "nothing older", "begins anew")
    assert "client 1" in disks.damage(oldest)
    assert newest.exists()


# content


def key_file(path, key, mode=0o600):
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(mode)
    return Asked(auth_key=path)


def test_private_key(tmp_path):
    path, key = tmp_path / "node", ec.generate_private_key(ec.SECP384R1())
    told(content.key(Asked()), "skip")
    told(content.key(Asked(auth_key=path)), "fail", "No such file")
    told(content.key(key_file(path, key)), "ok", "secp384r1", "0600")
    told(content.key(key_file(path, key, 0o640)), "fail", "mode 0640", "chmod 600")
    told(content.key(key_file(path, ed25519.Ed25519PrivateKey.generate())), "fail", "not on an elliptic curve")
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    told(content.key(Asked(auth_key=path)), "fail", "OpenSSH's format")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_data_and_backbone(stages):
    asked = Asked(told=TINY)
    told(content.data(Asked()), "skip", "--data NAME")
    told(content.data(asked), "ok", "5 examples to train, 4 examples to test", "3 classes")
    told(content.backbone(asked), "ok", "0123456789abcdef", "must be equal")
    stages["data"] = {"error": "DataError: no train.npz"}
    told(content.data(asked), "fail", "no train.npz", "--data-dir")
    stages["data"], stages["network"] = STAGES["data"], {"error": "ValueError: unknown model"}
    told(content.backbone(asked), "fail", "unknown model")
    stages["client"] = stages["data"] = {"error": "x"}
    told(content.data(asked), "skip")
    told(content.backbone(asked), "skip")


# the trial, and all of it together


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
    (finding,) = examine(asked, [CHECKS["data"]])
    told(finding, "fail", "no table of settings")
