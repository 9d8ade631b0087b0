"""``fedmask keys show``."""

from __future__ import annotations

import os
import subprocess
from datetime import timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from keyring import NOW, fedmask

from fedmask_flwr import keys


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
