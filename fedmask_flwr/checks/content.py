"""What this machine holds: its private key, its data, and the network that it would build."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from .base import Asked, Finding, check, fail, ok, skip, warn
from .trial import trial

__all__ = ["backbone", "data", "key"]

_SHARED = stat.S_IRWXG | stat.S_IRWXO


@check("private key")
def key(asked: Asked) -> Finding:
    """The node's key: readable by its owner alone, and of the kind that Flower loads."""
    if asked.auth_key is None:
        return skip("not asked: give --auth-key FILE where nodes are authenticated")
    path = asked.auth_key
    try:
        raw, mode, owner = path.read_bytes(), path.stat().st_mode, path.stat().st_uid
    except OSError as error:
        return fail(
            f"{path}: {error.strerror}", "give the node's private key, made on this machine by `fedmask keys node`"
        )
    if mode & _SHARED:
        return fail(
            f"{path} has mode {stat.S_IMODE(mode):04o}: others on this machine can use the node's identity",
            f"chmod 600 {path}; if others may have read it, make a new key and register that",
        )
    try:
        seen = f"{path}: {_curve(raw)}, mode {stat.S_IMODE(mode):04o}"
    except ValueError as error:
        return fail(
            f"{path} is no private key that Flower loads ({error})",
            "Flower reads elliptic-curve keys in OpenSSH's format without a password: use `fedmask keys node`",
        )
    if owner != os.geteuid():
        return warn(f"{seen}, owned by user {owner}", f"run this as the user who runs the node, or chown {path}")
    return ok(f"{seen}; whether the SuperLink knows it only a node's start tells")


def _curve(raw: bytes) -> str:
    """Curve of a private key in OpenSSH's format; ValueError for anything else."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        loaded = load_ssh_private_key(raw, None)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(str(error)) from error
    if not isinstance(loaded, EllipticCurvePrivateKey):
        raise ValueError("it is not on an elliptic curve")
    return str(loaded.curve.name)


@check("data", limit=250.0)
def data(asked: Asked) -> Finding:
    """The named set's training and test data; nothing is downloaded."""
    flat = asked.flat()
    if not flat.get("data") and not flat.get("scenario"):
        return skip("not asked: give --data NAME and --data-dir DIR")
    stages = trial(asked)
    got = stages["data"]
    if "error" in got:
        if any("error" in stages[before] for before in ("torch", "client")):
            return skip("needs torch")
        return fail(
            got["error"], "put the files where the message says, and give this machine's folder with --data-dir"
        )
    counts = ", ".join(f"{n} examples to {split}" for split, n in got["examples"].items())
    shape = " x ".join(map(str, got["shape"]))
    return ok(f"{got['name']}: {counts + ', ' if counts else ''}of shape {shape}, {got['classes']} classes")


@check("backbone", needs=("data",), limit=250.0)
def backbone(asked: Asked) -> Finding:
    """The digest of the network that this machine builds: frames of any other are refused."""
    stages = trial(asked)
    got = stages["network"]
    if "error" in got:
        if any("error" in stages[before] for before in ("torch", "client", "data")):
            return skip("needs torch and data")
        return fail(got["error"], "name the model and weights as on the server, and bring the checkpoint file here")
    seen = f"{got['digest']} ({got['named']}, {got['masked']} bits for {got['parameters']} parameters)"
    theirs = "" if asked.run is None else recorded(asked.run)
    if theirs and theirs != got["digest"]:
        return fail(
            f"{seen}; the run's checkpoint is of {theirs}",
            "another model, seed, include or weights file, or another version of torch: give what the run was told",
        )
    return ok(f"{seen}; " + ("as the run's checkpoint" if theirs else "must be equal on all machines"))


def recorded(run: Path) -> str:
    """Digest in a run's checkpoint, or ""."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(run / "checkpoint.safetensors", framework="numpy") as file:
            return str(json.loads((file.metadata() or {})["fedmask"])["meta"]["digest"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return ""
