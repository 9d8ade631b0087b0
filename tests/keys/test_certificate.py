"""What keys and certificates are good for, and CAs and names that are refused."""

from __future__ import annotations

import argparse
import ssl
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from keyring import NAMES, NOW, shake

from fedmask_flwr import keys


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
