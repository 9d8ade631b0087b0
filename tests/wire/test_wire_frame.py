from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_cases import DIGEST, frame_of, sample_payload

import fedmask_flwr.wire as wire
from fedmask_flwr.wire import Counts, Field, Frame, Payload, SideInfo, WireError, pack, pack_bits, unpack
from fedmask_flwr.wire.envelope import PNG, ZSTD, unwrap, wrap

scalars = st.one_of(
    st.integers(-(2**63), 2**63), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20)
)


def reseal(data):
    """The same bytes with a CRC that fits."""
    data = bytearray(data)
    struct.pack_into("<I", data, 19, zlib.crc32(data[23:], zlib.crc32(data[:19])))
    return bytes(data)


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(max_size=30)), max_size=5),
    st.dictionaries(st.text(max_size=9), scalars, max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_frame_round_trip(fields, meta, round_):
    fields = tuple(Field(f"f{i}", *f) for i, f in enumerate(fields))
    frame = Frame(DIGEST, round_, fields, meta)
    data = frame.to_bytes()
    again = Frame.parse(data)
    assert again == frame
    assert again.to_bytes() == data
    assert reseal(data) == data


def test_layout_is_the_documented_one():
    data = Frame(b"\1\2\3\4\5\6\7\x08", 3, (Field("mask", 0x42, 9, b"\xaa\xbb"),), {"b": 1, "a": 0.5}).to_bytes()
    assert data[:19] == b"FMK\x01" + bytes(range(1, 9)) + struct.pack("<IBH", 3, 1, 15)
    assert data[23:] == b"\x04mask\x42" + struct.pack("<QQ", 9, 2) + b'{"a":0.5,"b":1}' + b"\xaa\xbb"


def test_several_fields_of_all_kinds_and_empty_ones():
    known = SideInfo((5, 4))
    rng = np.random.default_rng(0)
    payload = Payload(
        bits={"m": pack_bits(rng.random(9) < 0.5), "n": pack_bits(rng.random(9) < 0.5)},
        counts={"c": Counts(np.arange(9, dtype=np.uint32), 8), "none": Counts(np.zeros(0, np.uint32), 3)},
        dense={"head": np.ones(3, np.float32), "nil": np.zeros(0, np.float32)},
        meta={"n": 1},
    )
    expect = {"m": 9, "n": 9, "c": 9, "none": 0, "head": 3, "nil": 0, "unused": 4}
    data = pack(payload, digest=DIGEST, round_=0, known=known)
    got = unpack(memoryview(data), digest=DIGEST, round_=0, known=known, expect=expect, require={"m": "bits"})
    for kind in ("bits", "dense"):
        for name, value in getattr(payload, kind).items():
            np.testing.assert_array_equal(getattr(got.payload, kind)[name], value)
    np.testing.assert_array_equal(got.payload.counts["c"].values, payload.counts["c"].values)
    assert (got.payload.meta, got.payload.counts["none"].top, got.nbytes) == ({"n": 1}, 3, len(data))
    assert list(got.codecs) == ["m", "n", "c", "none", "head", "nil"]


def test_a_frame_without_a_reference_needs_only_the_layer_sizes():
    payload, known = sample_payload("bits", 999)
    plain = SideInfo(known.sizes)
    for name in ("bits", "rice", "entropy"):
        data = pack(payload, digest=DIGEST, round_=0, known=plain, codecs={"bits": name})
        got = unpack(data, digest=None, round_=None, known=plain, expect={"x": 999})
        np.testing.assert_array_equal(got.payload.bits["x"], payload.bits["x"])
    one_layer = pack(payload, digest=DIGEST, round_=0, known=SideInfo((999,)), codecs={"bits": "rice"})
    got = unpack(one_layer, digest=None, round_=None, known=None, expect={"x": 999})
    np.testing.assert_array_equal(got.payload.bits["x"], payload.bits["x"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"digest": bytes(8)},
            "digest 0001020304050607, expected 0000000000000000; check that client and server use",
        ),
        ({"round_": 6}, "of round 5, expected round 6"),
        ({"expect": {"y": 100}}, "unexpected field 'x'; expected only y"),
        ({"expect": {"x": 101}}, "'x' has 100 elements, expected 101"),
        ({"require": {"x": "counts"}}, "came as bits, expected counts"),
        ({"require": {"z": "bits"}}, "'z' is missing; the frame has x"),
        ({"known": SideInfo((99,))}, "has 100 bits, the layers known here 99"),
    ],
)
def test_what_does_not_belong_here_is_refused(change, text):
    data, known = frame_of("bits", "rice", 100)
    args = {"digest": DIGEST, "round_": 5, "known": known, "expect": {"x": 100}}
    unpack(data, **args)
    with pytest.raises(WireError, match=text):
        unpack(data, **{**args, **change})


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, b"X", "not a fedmask frame"),
        (3, b"\x02", "format version 2, this package reads 1"),
        (16, b"\x09", "truncated within its field list|add up|printable"),
        (24, b" ", "not printable"),
        (25, b"\x3f", "unknown codec byte 0x3f"),
        (25, b"\xc2", "unknown codec byte 0xc2"),
        (34, b"\x00", "the lengths of the frame add up"),
        (42, b"[", "meta is not valid JSON"),
    ],
)
def test_damaged_heads_are_named(at, value, text):
    data, known = frame_of("bits", "bits", 100)
    bad = bytearray(data)
    bad[at : at + 1] = value
    with pytest.raises(WireError, match=text):
        unpack(reseal(bad), digest=DIGEST, round_=5, known=known, expect={"x": 100, " ": 100})
    if at > 3:
        with pytest.raises(WireError, match="CRC-32"):
            unpack(bytes(bad), digest=DIGEST, round_=5, known=known, expect={"x": 100})


def test_a_repeated_field_is_refused():
    frame = Frame(DIGEST, 0, (Field("a", 1, 8, b"x"), Field("b", 1, 8, b"x")), {})
    data = frame.to_bytes().replace(b"\x01b", b"\x01a")
    with pytest.raises(WireError, match="appears twice"):
        Frame.parse(reseal(data))


@pytest.mark.parametrize(
    "meta",
    [
        b"[1]",
        b"{}",
        b'{"a":true}',
        b'{"a":null}',
        b'{"a":{}}',
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        b"[" * 4000,
        b'{"a":1',
    ],
)
def test_hostile_meta(meta):
    data = bytearray(Frame(DIGEST, 0, (), {}).to_bytes())
    struct.pack_into("<H", data, 17, len(meta))
    with pytest.raises(WireError, match="meta"):
        Frame.parse(reseal(data + meta))


@pytest.mark.parametrize(
    ("frame", "text"),
    [
        (Frame(b"short", 0, (), {}), "8 bytes"),
        (Frame(DIGEST, -1, (), {}), "round"),
        (Frame(DIGEST, 0, (), {"a": True}), "meta holds"),
        (Frame(DIGEST, 0, (), {"a": float("nan")}), "meta holds"),
        (Frame(DIGEST, 0, (), {"a": "x" * 4096}), "at most 4096"),
        (Frame(DIGEST, 0, (Field("a b", 1, 0, b""),), {}), "printable"),
        (Frame(DIGEST, 0, (Field("a", 1, 0, b""), Field("a", 1, 0, b"")), {}), "twice"),
        (Frame(DIGEST, 0, tuple(Field(f"{i}", 1, 0, b"") for i in range(256)), {}), "at most 255"),
    ],
)
def test_frames_that_cannot_be_written(frame, text):
    with pytest.raises(ValueError, match=text):
        frame.to_bytes()


def test_pack_names_what_is_missing():
    bits = pack_bits(np.zeros(9, bool))
    with pytest.raises(ValueError, match="known=SideInfo"):
        pack(Payload(bits={"m": bits}), digest=DIGEST, round_=0, known=None)
    with pytest.raises(ValueError, match="above top"):
        Counts(np.array([3], np.uint32), 2)
    with pytest.raises(ValueError, match="uint32"):
        Counts(np.array([3]), 5)


def test_bombs_are_refused_before_they_expand():
    big = bytes(50_000_000)
    for envelope in (PNG, ZSTD):
        bomb = wrap(big, envelope)
        assert len(bomb) < 60_000
        assert len(unwrap(bomb, envelope, len(big))) == len(big)
        with pytest.raises(WireError, match="at most 1000"):
            unwrap(bomb, envelope, 1000)


def test_pngs_of_another_form_are_refused():
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    def png(image, **options):
        out = io.BytesIO()
        image.save(out, format="PNG", **options)
        return b"\x09" + out.getvalue()

    grey = Image.fromarray(np.arange(9, dtype=np.uint8).reshape(3, 3))
    assert unwrap(png(grey), PNG, 99) == bytes(range(9))
    text = PngInfo()
    text.add_text("k", "v" * 999, zip=True)
    wrong = [
        png(grey.convert("RGB")),
        png(grey.convert("1")),
        png(grey.convert("P")),
        png(grey.resize((9, 1))),
        png(grey, pnginfo=text),
        png(grey) + b"x",
        png(grey)[:-1],
        b"\x08" + png(grey)[1:],  # 3 x 3 with a pixel behind the end that is not zero
        b"\x00" + png(grey)[1:],
        b"\x09",
    ]
    for data in wrong:
        with pytest.raises(WireError, match="PNG"):
            unwrap(data, PNG, 99)


def test_all_is_the_public_surface():
    assert wire.__all__ == sorted(wire.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert all(hasattr(wire, name) for name in wire.__all__)


def test_wire_imports_without_torch_flwr_or_the_optional_packages():
    code = (
        "import sys\n"
        "for m in ('torch','torchvision','flwr','PIL','zstandard','pyfusefilter','xxhash'): sys.modules[m] = None\n"
        "import numpy as np\n"
        "from fedmask_flwr.wire import *\n"
        "known = SideInfo((9,))\n"
        "p = Payload(bits={'m': pack_bits(np.arange(9) % 2 == 0)})\n"
        "d = pack(p, digest=bytes(8), round_=0, known=known)\n"
        "assert unpack(d, digest=bytes(8), round_=0, known=known, expect={'m': 9}).payload.bits['m'][0] == 85\n"
        "for name, fix in (('fuse8', 'pyfusefilter'), ('rice+png', 'pillow'), ('rice+zstd', 'zstandard')):\n"
        "    try: pack(p, digest=bytes(8), round_=0, known=known, codecs={'bits': name})\n"
        "    except ImportError as e: assert 'pip install ' + fix in str(e), e\n"
        "    else: raise AssertionError(name)\n"
    )
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
