"""What containers may do, what the image holds, and who is let in."""

from __future__ import annotations

import json

import pytest
from stack import IMAGE, ROOT, Stack, docker, sh

pytestmark = [pytest.mark.slow, pytest.mark.docker]
SERVICES = ("superlink", "serverapp", "node0", "node1", "node2")
HEALTH = "/opt/fedmask/share/fedmask/health.py"
SECRETS = ("PRIVATE KEY", "password", "passwd=", "secret=", "token=")


@pytest.mark.parametrize("service", SERVICES)
def test_locked_down(stack, service):
    name = stack.container(service)
    found = json.loads(docker("inspect", name))[0]
    host = found["HostConfig"]
    assert found["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert not host["Privileged"]
    assert "no-new-privileges:true" in host["SecurityOpt"]
    assert 0 < host["Memory"] <= 2**30
    assert 0 < host["NanoCpus"] <= 10**9
    assert host["PidsLimit"] > 0
    status = docker("exec", name, "cat", "/proc/1/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    for place in ("/opt/fedmask/x", "/etc/x", "/x"):
        assert "Read-only file system" in sh("docker", "exec", name, "touch", place, check=False).stderr


def test_devices_reach_the_fleet_api_only(stack):
    """Whoever reaches the Control API may start runs and register nodes."""
    node, server = stack.container("node0"), stack.container("serverapp")
    assert not reaches(node, "superlink:8000")
    assert not reaches(node, "superlink-control:8000")
    assert not reaches(node, f"{address(stack, 'superlink', 'control')}:8000")
    assert reaches(node, "superlink:9092")
    assert reaches(server, "superlink-control:8000")
    ports = json.loads(docker("inspect", stack.container("superlink")))[0]["NetworkSettings"]["Ports"]
    assert [port for port, bound in ports.items() if bound] == ["9092/tcp"]
    assert {bound["HostIp"] for bound in ports["9092/tcp"]} == {"127.0.0.1"}


def reaches(container, place):
    return sh("docker", "exec", container, "python", HEALTH, place, check=False).returncode == 0


def address(stack, service, network):
    networks = json.loads(docker("inspect", stack.container(service)))[0]["NetworkSettings"]["Networks"]
    return networks[f"{stack.name}_{network}"]["IPAddress"]


def test_image_holds_no_secret(image):
    told = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + docker("inspect", image)
    assert not [word for word in SECRETS if word.lower() in told.lower()]
    places = "/opt/fedmask/share /opt/fedmask/bin /data /memory /runs /state /keys /tmp"
    held = docker(
        "run", "--rm", "--network", "none", image, "sh", "-c", f"find {places} -type f; ls /src 2>&1 || true"
    )
    assert not [line for line in held.splitlines() if line.endswith((".key", ".pem", ".safetensors", ".db"))]
    assert "No such file" in held.splitlines()[-1]


def test_only_the_source_reaches_the_engine(image, tmp_path):
    """Keys, runs and data lying about in a checkout do not come into a build."""
    meant = ("pyproject.toml", "fedmask_flwr/a.py", "fedmask_flwr/wire/b.py", "docker/submit.py", "LICENSE")
    stray = (
        "node.key",
        ".git/config",
        "docker/keys/server.key",
        "fedmask_flwr/ca.key",
        "runs/x/mask.fedmask",
        ".env",
    )
    for name in (*meant, *stray):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    file = tmp_path.with_suffix(".Dockerfile")
    file.write_text(f"FROM {image}\nCOPY . /tmp/context\n")
    built = f"{IMAGE}-context"
    docker("build", "-q", "-f", file, "-t", built, tmp_path)
    try:
        held = docker("run", "--rm", built, "find", "/tmp/context", "-type", "f", "-printf", "%P\\n").splitlines()
    finally:
        docker("rmi", built)
    assert sorted(held) == sorted(meant)


@pytest.fixture(scope="module")
def secure(image, tmp_path_factory):
    """A stack with TLS and node keys."""
    name = f"fedmask-tls-{tmp_path_factory.getbasetemp().name}"
    found = Stack(name, tmp_path_factory.mktemp("tls"), "compose.yaml", "compose.tls.yaml")
    try:
        found.up()
        yield found
    finally:
        found.down()


def test_trains_with_tls(secure):
    lines = secure.finished(secure.start("tls", num_server_rounds=2))
    assert [line["clients_ok"] for line in lines] == [3, 3]


def test_keys_are_private(secure):
    for node in ("node0", "node1", "node2"):
        held = docker("exec", secure.container(node), "find", "/keys", "-name", "*.key", "-printf", "%p %m\\n")
        assert held == f"/keys/own/{node}.key 600"
    assert (
        docker("exec", secure.container("superlink"), "find", "/keys", "-name", "*.key")
        == "/keys/server/server.key"
    )
    assert docker("exec", secure.container("serverapp"), "find", "/keys", "-name", "*.key") == ""
    assert "PRIVATE KEY" not in secure.compose("logs").stdout


def test_comes_up_again(secure):
    """Nodes that are registered already are nothing to fail on: after an update, say."""
    secure.up()
    listed = secure.compose("run", "--rm", "-T", "register", "cat", "/keys/public/nodes.jsonl").stdout
    assert len({json.loads(line)["fingerprint"] for line in listed.splitlines()}) == 3


def intruder(stack, make, certificate, *options):
    """A device that was not invited: its exit status and all it says."""
    node = f"flower-supernode --superlink superlink:9092 --root-certificates {certificate} {' '.join(options)}"
    where = "--network", f"{stack.name}_fleet", "-v", f"{stack.name}_public-keys:/keys/public:ro"
    return sh(
        "docker", "run", "--rm", *where, IMAGE, "sh", "-c", f"{make} && {node}", check=False,
    )  # fmt: skip


def test_a_key_that_is_not_registered_is_refused(secure):
    key = "--auth-supernode-private-key", "/tmp/k/x.key"
    done = intruder(secure, "fedmask keys node --out /tmp/k --name x", "/keys/public/ca.crt", *key)
    assert done.returncode != 0
    assert "code: 2004" in done.stdout + done.stderr


def test_no_key_is_refused(secure):
    done = intruder(secure, "true", "/keys/public/ca.crt")
    assert done.returncode != 0
    assert "code: 2001" in done.stdout + done.stderr


def test_another_ca_is_refused(secure):
    done = intruder(secure, "fedmask keys ca --out /tmp/ca", "/tmp/ca/ca.crt")
    assert done.returncode != 0
    assert "CERTIFICATE_VERIFY_FAILED" in done.stdout + done.stderr
