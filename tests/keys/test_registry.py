"""Registration of nodes, with a SuperLink that is none and with a real one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from keyring import fedmask

from fedmask_flwr import keys
from fedmask_flwr.keys import registry
from fedmask_flwr.simulation.sandbox import scripts


@pytest.fixture
def link(monkeypatch):
    """Flower's command line with a SuperLink behind it, in memory; keys.SuperLink is the way to it."""
    states: dict[str, str] = {}
    known: dict[str, str] = {}

    def flwr(superlink, command, *options):
        assert superlink == keys.SuperLink("lab")
        if command == "register":
            text = " ".join(Path(options[0]).read_text().split()[:2])
            if text in known:
                return {"success": False, "error-message": "Using x\n\n[code: 23] Public key already in use."}
            known[text] = str(7_000_000_000_000_000_000 + len(known))
            states[known[text]] = "registered"
            return {"success": True, "node-id": int(known[text])}
        if command == "unregister":
            states[options[0]] = "unregistered"
            return {"success": True, "node-id": int(options[0])}
        listed = [{"node-id": i, "status": s, "online-at": "N/A", "created-at": "now"} for i, s in states.items()]
        return {"success": True, "nodes": listed}

    monkeypatch.setattr(registry, "_flwr", flwr)
    return states


def test_register_list_unregister(link, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys.make_node(tmp_path, name="site-0")
    keys.make_node(tmp_path, name="site-1")
    on = ["--superlink", "lab"]
    first = fedmask("register", "site-0.pub", "site-1.pub", *on)
    assert len(link) == 2
    assert fedmask("register", "site-0.pub", "site-1.pub", *on) == first, "again is no change"
    listed = fedmask("list", *on)
    assert all(word in listed for word in ("site-0", "site-1", "registered", *link, "SHA256:"))
    zero = min(link)
    link[zero] = "online"
    assert "--switch" in fedmask("unregister", "site-0", *on, code=1)
    assert link[zero] == "online"
    fedmask("unregister", "site-0", *on, "--force")
    fedmask("unregister", "site-1.pub", *on)
    assert set(link.values()) == {"unregistered"}
    assert "takes no key twice" in fedmask("register", "site-0.pub", *on, code=1)
    assert "names 0 nodes" in fedmask("unregister", "site-0", *on, code=1)
    assert "has no node 12" in fedmask("unregister", "12", *on, code=1)
    Path(keys.BOOK).unlink()
    assert "rotate node" in fedmask("register", "site-1.pub", *on, code=1)
    Path(keys.BOOK).write_text("{}\n")
    assert "damaged" in fedmask("unregister", "site-1", *on, code=1)


def test_a_rotated_node_s_two_keys_are_told_apart(link, tmp_path):
    keys.make_node(tmp_path, name="site-0")
    keys.renew_node(tmp_path, name="site-0")
    on = ["--superlink", "lab"]
    fedmask("register", tmp_path / "site-0.pub", tmp_path / "site-0.next.pub", *on)
    old, new = link
    both = fedmask("unregister", "site-0", "--book", tmp_path / keys.BOOK, *on, code=1)
    assert old in both
    assert new in both
    fedmask("unregister", tmp_path / "site-0.pub", *on)
    assert link == {old: "unregistered", new: "registered"}


def test_what_is_not_registered(link, tmp_path, place):
    on = ["--superlink", "lab"]
    path = tmp_path / "rsa.pub"
    for private in (ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)):
        kind = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        path.write_bytes(private.public_key().public_bytes(*kind))
        assert "elliptic-curve" in fedmask("register", path, *on, code=1)
    assert "stays on its machine" in fedmask("register", place / "node/site-0.key", *on, code=1)
    assert "neither a key" in fedmask("register", place / "node/site-0.pub", place / "ca/ca.crt", *on, code=1)
    assert "one key" in fedmask("register", path, path, "--name", "x", *on, code=1)
    assert link == {}


@contextlib.contextmanager
def listening(place=None):
    """A socket on loopback; with a place, one that speaks TLS."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                end, _ = server.accept()
                end.settimeout(10)
                with end:
                    if place:
                        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                        context.load_cert_chain(place / "server/server.crt", place / "server/server.key")
                        context.wrap_socket(end, server_side=True).close()
                    else:
                        end.recv(100)
                        end.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
    thread.join(20)


def test_why_a_superlink_is_not_reached(place):
    def told(where, ca=None):
        roots = ["--root-certificates", place / ca / "ca.crt"] if ca else []
        return fedmask("register", place / "node/site-0.pub", "--superlink", where, *roots, code=1)

    assert "is the SuperLink up" in told(f"127.0.0.1:{free_ports(1)[0]}", "ca")
    with listening() as port:
        assert "does not speak TLS" in told(f"127.0.0.1:{port}", "ca")
    with listening(place) as port:
        assert "not trusted, checked by" in told(f"127.0.0.1:{port}", "other")
    with listening(place) as port:
        assert "--root-certificates" in told(f"127.0.0.1:{port}")
    assert "HOST:PORT" in told("superlink:port")
    with pytest.raises(keys.KeysError, match="No such file"):
        keys.nodes(keys.SuperLink("127.0.0.1:1", place / "none.crt"))


def free_ports(number):
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [s.getsockname()[1] for s in taken]


class Programs:
    """Flower's programs on loopback, each in a session of its own with its output in a file."""

    def __init__(self, folder):
        self.folder, self.running = folder, []

    def start(self, name, program, *options):
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        env = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_PROXY": "127.0.0.1",
            "PATH": f"{scripts()}{os.pathsep}{os.environ['PATH']}",
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [scripts() / program, *map(str, options)], env=env, cwd=home, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def wait_for(self, name, text, seconds=240):
        end = time.monotonic() + seconds
        while text not in (said := (self.folder / f"{name}.log").read_text(errors="replace")):
            assert time.monotonic() < end, said
            time.sleep(0.3)
        return said

    def stop(self, process, how=signal.SIGTERM):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        return process.wait(60)

    def stop_all(self):
        for process in self.running:
            self.stop(process, signal.SIGKILL)


@pytest.fixture
def programs(tmp_path):
    made = Programs(tmp_path)
    yield made
    made.stop_all()


@pytest.mark.slow
@pytest.mark.flower
def test_a_real_superlink(tmp_path, programs):
    """TLS and SuperNode authentication with these files: who is let in, who is not, and a key's renewal."""
    port, fleet, *runtime = free_ports(5)
    if tuple(map(int, importlib.metadata.version("flwr").split(".")[:2])) < (1, 40):
        own = ["--fleet-api-address", f"127.0.0.1:{fleet}"]
    else:
        fleet, own = port, []
    fedmask("ca", "--out", tmp_path / "ca")
    fedmask("ca", "--out", tmp_path / "other")
    fedmask(
        "server",
        "--ca",
        tmp_path / "ca",
        "--name",
        "127.0.0.1",
        "--name",
        "localhost",
        "--out",
        tmp_path / "server",
    )
    for name in ("known", "unknown"):
        fedmask("node", "--out", tmp_path / "nodes", "--name", name)
    nodes = tmp_path / "nodes"

    def superlink():
        return programs.start(
            "superlink", "flower-superlink", "--ssl-certfile", tmp_path / "server/server.crt",
            "--ssl-keyfile", tmp_path / "server/server.key", "--ssl-ca-certfile", tmp_path / "ca/ca.crt",
            "--enable-supernode-auth", "--host", "127.0.0.1", "--port", port, *own,
            "--database", tmp_path / "state.db",
        )  # fmt: skip

    def supernode(log, key, ca="ca", number=0):
        return programs.start(
            log, "flower-supernode", "--root-certificates", tmp_path / ca / "ca.crt", "--superlink",
            f"127.0.0.1:{fleet}", "--auth-supernode-private-key", nodes / key, "--port", runtime[number],
        )  # fmt: skip

    def statuses():
        found = keys.nodes(keys.SuperLink(f"localhost:{port}", tmp_path / "ca/ca.crt"), nodes / keys.BOOK)
        return {node.node_id: node.status for node in found}

    def until(node_id, status):
        end = time.monotonic() + 240
        while statuses().get(node_id) != status:
            assert time.monotonic() < end
            time.sleep(1)

    link = superlink()
    programs.wait_for("superlink", "Uvicorn running on https")
    on = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", tmp_path / "ca/ca.crt"]
    fedmask("register", nodes / "known.pub", *on)
    fedmask("register", nodes / "known.pub", *on)
    (known,) = statuses()
    wrong = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", tmp_path / "other/ca.crt"]
    assert "not trusted" in fedmask("register", nodes / "unknown.pub", *wrong, code=1)

    node = supernode("known", "known.key")
    refused = supernode("unknown", "unknown.key", number=1)
    misled = supernode("misled", "known.key", "other", number=2)
    programs.wait_for("known", f"SuperNode ID: {known}")
    assert refused.wait(240) != 0
    assert "Failed to activate SuperNode" in programs.wait_for("unknown", "Exit Code: 305")
    assert misled.wait(240) != 0
    assert "CERTIFICATE_VERIFY_FAILED" in programs.wait_for("misled", "Exit Code: 305")
    until(known, "online")
    assert list(statuses()) == [known]

    # The server's certificate is renewed under a running node, which comes back by itself.
    fedmask("rotate", "server", "--ca", tmp_path / "ca", "--dir", tmp_path / "server")
    programs.stop(link)
    (tmp_path / "superlink.log").unlink()
    superlink()
    programs.wait_for("superlink", "Uvicorn running on https")
    until(known, "online")
    assert node.poll() is None

    # The node's key is renewed; it is never without a registered one.
    rotate = ["rotate", "node", "--dir", nodes, "--name", "known"]
    fedmask(*rotate)
    fedmask("register", nodes / "known.next.pub", *on)
    assert "online" in fedmask("unregister", known, "--book", nodes / keys.BOOK, *on, code=1)
    fedmask(*rotate, "--switch")
    programs.stop(node)
    until(known, "offline")
    node = supernode("renewed", "known.key")
    (new,) = statuses().keys() - {known}
    programs.wait_for("renewed", f"SuperNode ID: {new}")
    fedmask("unregister", known, "--book", nodes / keys.BOOK, *on)
    until(new, "online")
    assert statuses()[known] == "unregistered"
    late = supernode("late", "known.key.old", number=1)
    assert late.wait(240) != 0
    assert "Failed to activate SuperNode" in programs.wait_for("late", "Exit Code: 305")
    lines = (nodes / keys.BOOK).read_text().splitlines()
    assert [json.loads(line)["gone"] for line in lines] == [False, False, True]
