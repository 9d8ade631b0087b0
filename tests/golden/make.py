"""Write the golden frames: one .bin per codec and envelope, from inputs keyed by SHAKE-256.

They keep the format from drifting, so existing files stay unless --force is given. Run: python tests/golden/make.py
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np

from fedmask_flwr.wire import Counts, Payload, Received, SideInfo, codec_names, pack, pack_bits, unpack

HERE = Path(__file__).parent
DIGEST = bytes.fromhex("fedc0ffee0ddf00d")
ROUND = 7
D = 3001
SIZES = (1000, 0, 1501, 500)
LONG = 2 * 8192  # two layers of this length let counts use a table a layer


def stream(key: str, n: int) -> np.ndarray:
    """n keyed u16 values, the same under every numpy."""
    raw = hashlib.shake_256(f"fedmask golden {key}".encode()).digest(2 * n)
    return np.frombuffer(raw, "<u2").astype(np.int64)


def ours() -> list[tuple[str, str]]:
    """(kind, codec name) of all golden frames."""
    return [(kind, n) for kind in ("bits", "counts", "dense") for n in codec_names(kind) if n != "auto"]


def case(kind: str) -> tuple[Payload, SideInfo, dict[str, int]]:
    """The payload of this kind, what both ends know, and the fields to expect."""
    meta = {"loss": 0.125, "n": 60, "who": "golden"}
    if kind == "bits":
        # sparse, then over half ones, then all ones: plain, complement and empty layers
        limit = np.repeat([0.04, 0.0, 0.8, 1.0], SIZES) * 65536
        reference = pack_bits(stream("reference", D) < 32768)
        mask = pack_bits(stream("mask", D) < limit) ^ reference
        # layers as classes, with gaps between them, each cut in two that the encoder joins
        classes = (np.repeat([200, 0, 3, 9], SIZES) + stream("classes", D) % 2).astype(np.uint8)
        return Payload(bits={"mask": mask}, meta=meta), SideInfo(SIZES, reference, lambda: classes), {"mask": D}
    if kind == "counts":
        small = stream("counts", LONG)
        fields = {
            "constant": Counts(np.full(50, 3, np.uint32), 10),
            "histogram": Counts(np.minimum(small[:4000] % 97, 12).astype(np.uint32), 12),
            "layers": Counts(np.where(np.arange(LONG) < LONG // 2, small % 3, 9 + small % 2).astype(np.uint32), 10),
            "nothing": Counts(np.zeros(0, np.uint32), 10),
            "planes": Counts((small[:300] * 65537 % 2**32).astype(np.uint32), 2**32 - 1),
            "uniform": Counts((small[:500] % 11).astype(np.uint32), 10),
        }
        classes = (stream("halves", LONG) < np.where(np.arange(LONG) < LONG // 2, 4096, 61440)).astype(np.uint8)
        known = SideInfo((LONG // 2, LONG // 2), classes=lambda: classes)
        return Payload(counts=fields, meta=meta), known, {k: v.values.size for k, v in fields.items()}
    values = ((stream("dense", 300) - 32768) / 4096).astype(np.float32)
    return Payload(dense={"head": values}, meta=meta), SideInfo(()), {"head": 300}


def encode(kind: str, name: str) -> bytes:
    """The frame as this version writes it."""
    payload, known, _ = case(kind)
    return pack(payload, digest=DIGEST, round_=ROUND, known=known, codecs={kind: name})


def decode(kind: str, data: bytes) -> Received:
    """The frame as this version reads it."""
    _, known, expect = case(kind)
    return unpack(data, digest=DIGEST, round_=ROUND, known=known, expect=expect)


def fingerprint(payload: Payload) -> str:
    """SHA-256 over all decoded values and the meta."""
    state = hashlib.sha256(json.dumps(dict(payload.meta), sort_keys=True).encode())
    for name, bits in sorted(payload.bits.items()):
        state.update(name.encode() + bits.tobytes())
    for name, counts in sorted(payload.counts.items()):
        state.update(f"{name} {counts.top}".encode() + counts.values.astype("<u4").tobytes())
    for name, dense in sorted(payload.dense.items()):
        state.update(name.encode() + dense.astype("<f4").tobytes())
    return state.hexdigest()


def main() -> None:
    """Write what is missing, or everything with --force."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--force", action="store_true", help="overwrite: only when the format version changes")
    force = parser.parse_args().force
    index = HERE / "decoded.json"
    decoded = json.loads(index.read_text()) if index.exists() else {}
    for kind, name in ours():
        path = HERE / f"{name}.bin"
        if force or not path.exists():
            path.write_bytes(encode(kind, name))
            decoded[name] = fingerprint(decode(kind, path.read_bytes()).payload)
    index.write_text(json.dumps(decoded, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
