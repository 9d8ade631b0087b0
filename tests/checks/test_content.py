"""The node's key, its data and its network."""

from __future__ import annotations

import stat

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from findings import TINY, told

from fedmask_flwr.checks import Asked, content


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
    found = stages["data"]
    stages["data"] = {"error": "DataError: no train.npz"}
    told(content.data(asked), "fail", "no train.npz", "--data-dir")
    stages["data"], stages["network"] = found, {"error": "ValueError: unknown model"}
    told(content.backbone(asked), "fail", "unknown model")
    stages["client"] = stages["data"] = {"error": "x"}
    told(content.data(asked), "skip")
    told(content.backbone(asked), "skip")
