"""The bytes of every codec, frozen: old files stay readable, and our own encoders write the same ones."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)
DECODED = json.loads((GOLDEN / "decoded.json").read_text())


@pytest.mark.parametrize(("kind", "name"), make.ours())
def test_golden_frame(kind, name):
    data = (GOLDEN / f"{name}.bin").read_bytes()
    got = make.decode(kind, data)
    assert {c.name for c in got.codecs.values()} == {name.partition("+")[0]}
    assert make.fingerprint(got.payload) == DECODED[name]
    payload, known, _ = make.case(kind)
    if all(c.lossless for c in got.codecs.values()):
        assert make.fingerprint(payload) == DECODED[name]
    elif kind == "bits":
        delta, found = known.delta(payload.bits["mask"]), known.delta(got.payload.bits["mask"])
        assert not np.any(delta & ~found)
    if name in (
        "bits",
        "rice",
        "entropy",
        "context",
        "counts",
        "float32",
        "float16",
    ):  # the others' bytes are other libraries'
        assert make.encode(kind, name) == data


def test_no_stray_golden_files():
    assert {p.stem for p in GOLDEN.glob("*.bin")} == {n for _, n in make.ours()} == set(DECODED)


def test_golden_counts_cover_every_mode():
    received = make.decode("counts", (GOLDEN / "counts.bin").read_bytes())
    modes = {f.name: f.body[5 if f.name == "planes" else 1] for f in received.frame.fields}
    assert modes == {"constant": 0, "histogram": 2, "layers": 3, "nothing": 0, "planes": 1, "uniform": 1}
