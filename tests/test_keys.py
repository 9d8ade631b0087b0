"""`fedmask keys`: what the files are good for, who may read them, what is never overwritten."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from typer.testing import CliRunner

from fedmask_flwr import keys
from fedmask_flwr.cli import app
from fedmask_flwr.keys import registry
from fedmask_flwr.simulation.sandbox import scripts

NAMES = ["localhost", "superlink", "fl.example.org", "127.0.0.1", "::1", "*.farm.example"]
NOW = datetime.now(UTC)


def fedmask(*args, code=0):
    result = CliRunner().invoke(app, ["keys", *map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A CA, another one, a server's files and a node's: read only."""
    folder = tmp_path_factory.mktemp("keys")
    keys.make_ca(folder / "ca")
    keys.make_ca(folder / "other")
    keys.make_server(folder / "ca", NAMES, folder / "server")
    keys.make_node(folder / "node", name="site-0")
    return folder


def modes(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in sorted(folder.iterdir())}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What the files are good for.


def shake(server, roots, host):
    """A TLS handshake in memory, as strict as Python 3.13 is."""
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(server / "server.crt", server / "server.key")
    theirs = ssl.create_default_context(cafile=roots)
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        theirs.wrap_bio(down, up, server_hostname=host),
        ours.wrap_bio(up, down, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return ends[0].cipher()


@pytest.mark.parametrize("host", [*NAMES[:-1], "a.farm.example"])
def test_a_server_is_trusted_under_each_of_its_names(place, host):
    assert shake(place / "server", place / "ca/ca.crt", host)


@pytest.mark.parametrize("host", ["example.org", "127.0.0.2", "a.b.farm.example", "localhost.example"])
def test_and_under_no_other(place, host):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"mismatch|not valid for"):
        shake(place / "server", place / "ca/ca.crt", host)


def test_another_ca_does_not_vouch_for_it(place):
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self.signed"):
        shake(place / "server", place / "other/ca.crt", "localhost")


def test_a_server_s_certificate_cannot_sign_others(place, tmp_path):
    """Not by our own command, nor, were it done by hand, for a verifier."""
    (tmp_path / "ca.key").write_bytes((place / "server/server.key").read_bytes())
    (tmp_path / "ca.key").chmod(0o600)
    (tmp_path / "ca.crt").write_bytes((place / "server/server.crt").read_bytes())
    with pytest.raises(keys.KeysError, match="not the certificate of a CA"):
        keys.make_server(tmp_path, ["evil"], tmp_path / "evil")
    first, root = x509.load_pem_x509_certificates((place / "server/server.crt").read_bytes())
    assert not first.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0


def test_certificates_say_what_they_should(place):
    for file, days in (("server/server.crt", 365), ("ca/ca.crt", 3650)):
        one = x509.load_pem_x509_certificates((place / file).read_bytes())[0]
        assert one.signature_hash_algorithm.name == "sha384"
        assert one.public_key().curve.name == "secp384r1"
        assert timedelta(minutes=4) < datetime.now(UTC) - one.not_valid_before_utc < timedelta(minutes=30)
        assert one.not_valid_after_utc - one.not_valid_before_utc == timedelta(days=days, minutes=5)
        assert one.serial_number.bit_length() > 100
        usage = one.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign == (file == "ca/ca.crt") != usage.value.digital_signature
    server, root = x509.load_pem_x509_certificates((place / "server/server.crt").read_bytes())
    assert [e.dotted_string for e in server.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value] == [
        "1.3.6.1.5.5.7.3.1"
    ]
    of_issuer = server.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert of_issuer == root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_grpc_takes_the_files(place):
    def echo(request, _context):
        return request

    handler = grpc.method_handlers_generic_handler("t", {"Echo": grpc.unary_unary_rpc_method_handler(echo)})
    server = grpc.server(ThreadPoolExecutor(1), handlers=(handler,))
    pair = ((place / "server/server.key").read_bytes(), (place / "server/server.crt").read_bytes())
    roots = (place / "ca/ca.crt").read_bytes()
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair], roots, False))
    server.start()
    try:
        for ca, works in (("ca", True), ("other", False)):
            credentials = grpc.ssl_channel_credentials((place / ca / "ca.crt").read_bytes())
            with grpc.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
                if works:
                    assert channel.unary_unary("/t/Echo")(b"hello", timeout=20) == b"hello"
                    continue
                with pytest.raises(grpc.RpcError, match="CERTIFICATE_VERIFY_FAILED"):
                    channel.unary_unary("/t/Echo")(b"hello", timeout=20)
    finally:
        server.stop(None)


@pytest.mark.flower
def test_flower_loads_the_files(place):
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.common.args import try_obtain_server_certificates
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    arguments = argparse.Namespace(
        auth_supernode_private_key=str(place / "node/site-0.key"),
        auth_supernode_public_key=None,
        ssl_certfile=str(place / "server/server.crt"),
        ssl_keyfile=str(place / "server/server.key"),
        ssl_ca_certfile=str(place / "ca/ca.crt"),
    )
    private, public = _try_setup_client_authentication(arguments)
    assert private.curve.name == "secp384r1"
    assert bytes_to_public_key(try_load_public_key(place / "node/site-0.pub")) == public
    assert try_obtain_server_certificates(arguments)[1].count(b"BEGIN CERTIFICATE") == 2


# Who may read them, and what is never overwritten.


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_whatever_the_umask(tmp_path, umask, monkeypatch):
    born = []
    real = os.open

    def watching(path, flags, mode=0o777, **rest):
        if flags & os.O_CREAT:
            born.append((flags & os.O_EXCL, mode))
        return real(path, flags, mode, **rest)

    monkeypatch.setattr(os, "open", watching)
    before = os.umask(umask)
    try:
        keys.make_ca(tmp_path / "deep/ca")
        keys.make_server(tmp_path / "deep/ca", ["a"], tmp_path / "server")
        keys.make_node(tmp_path / "node")
        keys.renew_server(tmp_path / "deep/ca", tmp_path / "server")
        keys.renew_node(tmp_path / "node")
        keys.renew_node(tmp_path / "node", switch=True)
    finally:
        os.umask(before)
    assert modes(tmp_path) == {"deep": 0o700, "server": 0o700, "node": 0o700}
    assert modes(tmp_path / "deep") == {"ca": 0o700}
    assert modes(tmp_path / "deep/ca") == {"ca.crt": 0o644, "ca.key": 0o600}
    pair = {"server.crt": 0o644, "server.key": 0o600}
    assert modes(tmp_path / "server") == pair | {f"{name}.old": mode for name, mode in pair.items()}
    pair = {"node.pub": 0o644, "node.key": 0o600}
    assert modes(tmp_path / "node") == pair | {f"{name}.old": mode for name, mode in pair.items()}
    assert len(born) == 10
    assert all(exclusive and mode == 0o600 for exclusive, mode in born)


MAKING = [
    ("ca.key", lambda out, ca: keys.make_ca(out), "--out"),
    ("ca.crt", lambda out, ca: keys.make_ca(out), "--out"),
    ("server.key", lambda out, ca: keys.make_server(ca, ["a"], out), "fedmask keys rotate server"),
    ("server.crt", lambda out, ca: keys.make_server(ca, ["a"], out), "fedmask keys rotate server"),
    ("node.key", lambda out, ca: keys.make_node(out), "fedmask keys rotate node"),
    ("node.pub", lambda out, ca: keys.make_node(out), "fedmask keys rotate node"),
]


@pytest.mark.parametrize(("name", "make", "remedy"), MAKING)
def test_nothing_is_overwritten(place, tmp_path, name, make, remedy):
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(keys.KeysError, match=re.escape(remedy)):
        make(tmp_path, place / "ca")
    assert files(tmp_path) == {name: b"precious"}
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(keys.KeysError, match="exists"):
        make(tmp_path, place / "ca")
    assert files(tmp_path) == {}


def test_nor_what_appears_in_the_last_moment(place, tmp_path, monkeypatch):
    real = os.link

    def late(source, target, **rest):
        if Path(target).name == "server.crt":
            Path(target).write_bytes(b"someone else's")
        real(source, target, **rest)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(keys.KeysError, match=r"server\.crt"):
        keys.make_server(place / "ca", ["a"], tmp_path)
    assert files(tmp_path) == {"server.crt": b"someone else's"}


STEPS = {
    "make": lambda at: keys.make_server(at / "ca", ["a"], at / "new/folder"),
    "renew": lambda at: keys.renew_server(at / "ca", at / "server"),
    "next": lambda at: keys.renew_node(at / "node", name="site-0"),
    "switch": lambda at: keys.renew_node(at / "rotating", switch=True),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("call", ["open", "fchmod", "fsync", "link", "rename"])
def test_a_failure_leaves_all_as_it_was(place, tmp_path, step, call, monkeypatch):
    """A disk that is full at any of the calls: no partial set, no lost key, no hidden leftovers."""
    for folder in ("ca", "server", "node"):
        (tmp_path / folder).mkdir()
        for path in (place / folder).iterdir():
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
            (tmp_path / folder / path.name).chmod(path.stat().st_mode)
    keys.make_node(tmp_path / "rotating")
    keys.renew_node(tmp_path / "rotating")
    before = files(tmp_path)
    owner, name = (Path, "replace") if call == "rename" else (os, call)
    real, failed = getattr(owner, name), 0
    for number in range(20):
        calls = iter(range(100))

        def full(*args, calls=calls, number=number, real=real, **kwargs):
            if next(calls) == number:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            try:
                STEPS[step](tmp_path)
            except keys.KeysError as error:
                assert "No space left on device" in str(error)
                assert "nothing was changed" in str(error)
                assert files(tmp_path) == before
                assert not (tmp_path / "new").exists()
                failed += 1
                continue
        break
    wanted = {"make": {"rename": 0}, "next": {"rename": 0}, "switch": {"open": 1, "fchmod": 0, "fsync": 1}}
    assert failed >= wanted.get(step, {}).get(call, 2)
    assert files(tmp_path) != before


def test_no_secret_is_told(place, tmp_path):
    """Neither by a command, nor in an error, nor in the text of an object."""
    said = fedmask("ca", "--out", tmp_path / "ca")
    said += fedmask("server", "--ca", tmp_path / "ca", "--name", "a", "--out", tmp_path / "server")
    said += fedmask("node", "--out", tmp_path / "node")
    private = sorted(tmp_path.rglob("*.key"))
    assert len(private) == 3
    said += fedmask("show", *private)
    for path in private:
        said += fedmask("register", path, "--superlink", "127.0.0.1:1", code=1)
    (tmp_path / "bad").mkdir()
    for path in private:
        damaged = path.read_text().replace("A", "B", 3)
        (tmp_path / "bad" / path.name).write_text(damaged)
        said += fedmask("show", tmp_path / "bad" / path.name, code=1)
    for path in private:
        body = path.read_text().splitlines()[1:-1]
        assert len(body) >= 3
        assert not any(line in said or line.replace("A", "B", 3) in said for line in body)
    from fedmask_flwr.keys.files import File

    assert "secret" not in repr(File("x", b"secret", 0o600))


# A CA that cannot sign.


def test_an_unfit_ca_is_told(place, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(keys.KeysError, match=r"ca\.key is missing; .*fedmask keys ca"):
        keys.make_server(tmp_path, ["a"], out)
    keys.make_ca(tmp_path / "short", days=1, now=NOW - timedelta(days=9))
    with pytest.raises(keys.KeysError, match=r"expired on .* new CA"):
        keys.make_server(tmp_path / "short", ["a"], out)
    keys.make_ca(tmp_path / "early", now=NOW + timedelta(hours=1))
    with pytest.raises(keys.KeysError, match="clock"):
        keys.make_server(tmp_path / "early", ["a"], out)
    keys.make_ca(tmp_path / "mixed")
    (tmp_path / "mixed/ca.crt").write_bytes((place / "other/ca.crt").read_bytes())
    with pytest.raises(keys.KeysError, match="different CAs"):
        keys.make_server(tmp_path / "mixed", ["a"], out)
    (tmp_path / "mixed/ca.key").write_bytes(b"-----BEGIN PRIVATE KEY-----\nzz\n-----END PRIVATE KEY-----\n")
    with pytest.raises(keys.KeysError, match="not a PEM private key"):
        keys.make_server(tmp_path / "mixed", ["a"], out)
    (tmp_path / "mixed/ca.crt").write_bytes(b"nothing")
    with pytest.raises(keys.KeysError, match="no PEM certificate"):
        keys.make_server(tmp_path / "mixed", ["a"], out)
    (tmp_path / "early/ca.key").chmod(0o640)
    with pytest.raises(keys.KeysError, match="chmod 600"):
        keys.make_server(tmp_path / "early", ["a"], out, now=NOW + timedelta(hours=2))
    assert not out.exists()


def test_a_server_does_not_outlive_its_ca(tmp_path):
    keys.make_ca(tmp_path / "ca", days=10)
    keys.make_server(tmp_path / "ca", ["a"], tmp_path, days=365)
    server, root = x509.load_pem_x509_certificates((tmp_path / "server.crt").read_bytes())
    assert server.not_valid_after_utc == root.not_valid_after_utc


@pytest.mark.parametrize(
    "name", ["", "superlink:9092", "https://a", "a/b", "-a", "a..b", "300.1.1.1", "10.0.0", "a b", "x" * 64, "*"]
)
def test_a_name_that_is_none(place, tmp_path, name):
    with pytest.raises(keys.KeysError, match="no DNS name"):
        keys.make_server(place / "ca", ["good", name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_and_days(place, tmp_path):
    keys.make_server(place / "ca", ["Über.example", "SUPER_link", "[::1]", "a", "a"], tmp_path)
    first = x509.load_pem_x509_certificates((tmp_path / "server.crt").read_bytes())[0]
    names = first.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in names] == ["xn--ber-goa.example", "super_link", "::1", "a"]
    with pytest.raises(keys.KeysError, match="names"):
        keys.make_server(place / "ca", [], tmp_path / "out")
    with pytest.raises(keys.KeysError, match="--days 0"):
        keys.make_ca(tmp_path / "out", days=0)
    for name in ("../up", "", ".hidden", "a b", "x" * 65):
        with pytest.raises(keys.KeysError, match="node's name"):
            keys.make_node(tmp_path / "out", name=name)
    assert not (tmp_path / "out").exists()


# Renewal.


def test_a_server_is_renewed_and_old_nodes_still_trust_it(place, tmp_path):
    keys.make_server(place / "ca", ["old.example", "10.0.0.1"], tmp_path)
    before = files(tmp_path)
    said = fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path)
    assert "Restart the SuperLink" in said
    after = files(tmp_path)
    assert {f"{name}.old": data for name, data in before.items()}.items() <= after.items()
    assert len(set(after.values())) == 4
    for host in ("old.example", "10.0.0.1"):
        assert shake(tmp_path, place / "ca/ca.crt", host)
    assert "--drop-old" in fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path, code=1)
    assert files(tmp_path) == after
    fedmask("rotate", "server", "--dir", tmp_path, "--drop-old")
    assert set(files(tmp_path)) == {"server.key", "server.crt"}
    assert "nothing to delete" in fedmask("rotate", "server", "--dir", tmp_path, "--drop-old", code=1)
    assert "--ca" in fedmask("rotate", "server", "--dir", tmp_path, code=1)
    fedmask("rotate", "server", "--ca", place / "ca", "--dir", tmp_path, "--name", "new.example")
    assert shake(tmp_path, place / "ca/ca.crt", "new.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(tmp_path, place / "ca/ca.crt", "old.example")
    assert "make them first" in fedmask("rotate", "server", "--ca", place / "ca", "--dir", place / "ca", code=1)


def test_a_node_has_a_registered_key_at_every_step(tmp_path):
    fedmask("node", "--out", tmp_path, "--name", "site-0")
    old = files(tmp_path)
    rotate = ["rotate", "node", "--dir", tmp_path, "--name", "site-0"]
    assert "make it first" in fedmask(*rotate, "--switch", code=1)
    assert "only then" in fedmask(*rotate)
    assert old.items() <= files(tmp_path).items()
    new = files(tmp_path)
    assert "--switch" in fedmask(*rotate, code=1)
    assert "unregister" in fedmask(*rotate, "--switch")
    assert files(tmp_path) == {
        "site-0.key": new["site-0.next.key"],
        "site-0.pub": new["site-0.next.pub"],
        "site-0.key.old": old["site-0.key"],
        "site-0.pub.old": old["site-0.pub"],
    }
    assert new["site-0.next.pub"].split()[2] == b"site-0"
    fedmask(*rotate)
    assert "--drop-old" in fedmask(*rotate, "--switch", code=1)
    fedmask(*rotate, "--drop-old")
    fedmask(*rotate, "--switch")
    assert "make it first" in fedmask("rotate", "node", "--dir", tmp_path, code=1)


# Show.


def test_show(place, tmp_path):
    text = fedmask("show", place / "server/server.crt", place / "ca/ca.crt", place / "node/site-0.pub")
    for part in (
        "names: localhost, superlink, fl.example.org, 127.0.0.1, ::1",
        "certificate of a CA",
        "name: site-0",
    ):
        assert part in text
    assert "warning" not in text
    done = subprocess.run(
        ["openssl", "x509", "-in", place / "server/server.crt", "-noout", "-fingerprint", "-sha256"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip().split("=")[1] in text
    key = keys.show(place / "node/site-0.key")
    assert key.warnings == ()
    assert dict(key.facts)["fingerprint of its public key"] in text


def test_show_warns(place, tmp_path):
    end = x509.load_pem_x509_certificates((place / "server/server.crt").read_bytes())[0].not_valid_after_utc

    def warned(path, now=NOW):
        return " ".join(keys.show(path, now=now).warnings)

    server = place / "server/server.crt"
    assert "expires in 9 days" in warned(server, end - timedelta(days=9, hours=1))
    assert "rotate server" in warned(server, end + timedelta(days=1))
    assert "expired" in warned(server, end)
    assert "clock" in warned(server, NOW - timedelta(days=1))
    assert "new CA" in warned(place / "ca/ca.crt", NOW + timedelta(days=3640))
    tmp_path.chmod(0o700)
    wide = tmp_path / "wide.key"
    wide.write_bytes((place / "node/site-0.key").read_bytes())
    for mode, wrong in ((0o600, False), (0o640, True), (0o604, True), (0o622, True)):
        wide.chmod(mode)
        assert ("chmod 600" in warned(wide)) == wrong
    wide.chmod(0o600)
    tmp_path.chmod(0o777)
    assert "go-w" in warned(wide)


def encoded(private, password=None, ssh=False):
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    kind = serialization.PrivateFormat.OpenSSH if ssh else serialization.PrivateFormat.PKCS8
    return private.private_bytes(serialization.Encoding.PEM, kind, how)


def test_show_of_other_files(tmp_path):
    path = tmp_path / "file"
    for data, told in (
        (b"", "neither a key nor"),
        (os.urandom(99), "neither a key nor"),
        (b"x" * (2 << 20), "larger than"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no PEM certificate"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "damaged"),
    ):
        path.write_bytes(data)
        path.chmod(0o600)
        assert told in fedmask("show", path, code=1)
    assert "No such file" in fedmask("show", tmp_path / "none", code=1)
    path.write_bytes(encoded(ec.generate_private_key(ec.SECP256R1()), b"word"))
    assert "passphrase" in fedmask("show", path)
    path.write_bytes(encoded(rsa.generate_private_key(65537, 2048)))
    assert "elliptic-curve keys only" in fedmask("show", path)


# Registration, with a SuperLink that is none.


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


# The real thing.


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
