"""Servers on loopback for the doctor: TLS with certificates of its own, plain gRPC, one that says nothing."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def certificate(subject, issuer, key, signer, *, first, last, names=(), ca=False):
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + first * DAY)
        .not_valid_after(NOW + last * DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
    return builder.sign(signer, hashes.SHA256())


class Authority:
    """A CA in a folder."""

    def __init__(self, folder, subject="test CA", last=3650, first=-10):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.subject = folder, subject
        self.key = ec.generate_private_key(ec.SECP256R1())
        made = certificate(subject, subject, self.key, self.key, first=first, last=last, ca=True)
        self.path = folder / "ca.crt"
        self.path.write_bytes(made.public_bytes(Encoding.PEM))

    def server(self, first=-1, last=365, names=("localhost", "127.0.0.1")):
        """Paths of a server's certificate and key."""
        alternatives = []
        for one in names:
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(one)))
            except ValueError:
                alternatives.append(x509.DNSName(one))
        key = ec.generate_private_key(ec.SECP256R1())
        made = certificate("superlink", self.subject, key, self.key, first=first, last=last, names=alternatives)
        paths = self.folder / "server.pem", self.folder / "server.key"
        paths[0].write_bytes(made.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths


@contextlib.contextmanager
def listening(serve):
    """Call ``serve(connection)`` for each connection to a port of loopback; yields that port."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    stop = threading.Event()
    open_ones = []

    def loop():
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(2)
            open_ones.append(connection)
            with contextlib.suppress(OSError):
                serve(connection)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        for one in (listener, *open_ones):
            one.close()


def tls(paths, alpn=("h2",)):
    """A server that shakes hands and says nothing more."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*paths)
    if alpn:
        context.set_alpn_protocols(list(alpn))

    def serve(connection):
        with context.wrap_socket(connection, server_side=True) as secured, contextlib.suppress(OSError):
            secured.recv(1)

    return listening(serve)


def saying(answer=b""):
    """A server that sends ``answer`` to whatever it hears and hangs up; with none it stays silent."""

    def serve(connection):
        if answer:
            connection.recv(256)
            connection.sendall(answer)
            connection.close()

    return listening(serve)


@contextlib.contextmanager
def grpc_server(paths=None):
    """A real gRPC server without services."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    if paths is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = paths[1].read_bytes(), paths[0].read_bytes()
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
