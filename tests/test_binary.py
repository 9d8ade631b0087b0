"""Binary sets: both forms of file, what is missing, what is hostile."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.data import DataError, binary_splits, load


def bits(n, d, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (n, d)).astype(np.uint8)


def write_text(folder, stem, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, x in splits.items():
        (folder / f"{stem}.{split}.data").write_text("".join(",".join(map(str, row)) + "\n" for row in x))


def packed(**splits):
    out = {}
    for split, x in splits.items():
        out |= {split: np.packbits(x, axis=1), f"{split}_n": np.int64(x.shape[1])}
    return out


@pytest.mark.parametrize("below", ["", "debd", "toy", "debd/toy"])
@pytest.mark.parametrize("form", ["text", "npz"])
def test_both_forms_in_each_place(tmp_path, below, form):
    train, test = bits(9, 11), bits(4, 11, 1)
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    if form == "text":
        write_text(folder, "toy", train=train, test=test)
    else:
        np.savez(folder / "toy.npz", **packed(train=train, test_reconstructed=test))
    got = binary_splits("debd/toy", str(tmp_path))
    assert list(got) == ["train", "test"]
    np.testing.assert_array_equal(got["train"], train)
    np.testing.assert_array_equal(got["test"], test)
    d = load("debd/toy", "test", str(tmp_path))
    assert (d.x.dtype, d.num_classes, d.in_shape, d.valid, d.labels) == (np.float32, 1, (11,), None, None)
    np.testing.assert_array_equal(d.x, test)
    assert d.y.tolist() == [0] * 4


@given(
    x=st.integers(1, 20).flatmap(lambda d: st.lists(st.lists(st.booleans(), min_size=d, max_size=d), min_size=1))
)
def test_text_is_what_numpy_reads(tmp_path_factory, x):
    folder = tmp_path_factory.mktemp("text")
    x = np.array(x, np.uint8)
    write_text(folder, "t", valid=x)
    want = np.loadtxt(folder / "t.valid.data", np.uint8, delimiter=",", ndmin=2)
    np.testing.assert_array_equal(binary_splits("debd/t", str(folder))["valid"], want)
    np.savez(folder / "p.npz", **packed(valid=x))
    np.testing.assert_array_equal(binary_splits("debd/p", str(folder))["valid"], want)


def test_windows_ends_spaces_and_no_last_end(tmp_path):
    (tmp_path / "t.train.data").write_bytes(b"0, 1,1\r\n1,0, 0\r\n\r\n")
    (tmp_path / "t.test.data").write_bytes(b"1,1,1")
    got = binary_splits("debd/t", str(tmp_path))
    assert got["train"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert got["test"].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("splits", [("train", "valid"), ("valid", "test"), ("valid",), ("test",)])
def test_a_set_without_train_or_test_is_pooled(tmp_path, splits):
    rows = np.unpackbits(np.arange(84, dtype=np.uint8)[:, None], axis=1)  # each row once
    write_text(tmp_path, "t", **dict(zip(splits, np.array_split(rows, len(splits)), strict=True)))
    train, test = (load("debd/t", split, str(tmp_path)).x for split in ("train", "test"))
    assert (len(train), len(test)) == (72, 12)
    both = np.concatenate([train, test]).astype(np.uint8)
    assert sorted(np.packbits(both, axis=1)[:, 0].tolist()) == list(range(84))


def test_the_pool_is_pinned(tmp_path):
    rows = np.unpackbits(np.arange(14, dtype=np.uint8)[:, None], axis=1)
    write_text(tmp_path, "t", valid=rows)
    test = load("debd/t", "test", str(tmp_path)).x.astype(np.uint8)
    assert np.packbits(test, axis=1)[:, 0].tolist() == POOLED


POOLED = [6, 9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1"),
        ("\n\n", "line 1"),
        ("0,1\n0,1,1\n", "line 2"),
        ("0,1\n\n0,1\n", "line 2"),
        ("0,1\n0,2\n", "line 2"),
        ("0,1\n0;1\n", "line 2"),
        ("0,1\n01,\n", "line 2"),
        ("0,1\n0,-\n", "line 2"),
        ("01\n", "line 1"),
        ("0,1,\n", "line 1"),
        ("nan,1\n", "line 1"),
        ("\x80\x04K\x01.", "line 1"),
    ],
)
def test_damaged_text(tmp_path, text, message):
    (tmp_path / "t.train.data").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=f"train.data, {message}: expected 0 and 1"):
        binary_splits("debd/t", str(tmp_path))


def npy(x, pickle=False):
    f = io.BytesIO()
    np.lib.format.write_array(f, x, allow_pickle=pickle)
    return f.getvalue()


def header(shape, descr="|u1", body=b""):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, {"descr": descr, "fortran_order": False, "shape": shape})
    return f.getvalue() + body


GOOD, EIGHT = npy(np.zeros((2, 1), np.uint8)), npy(np.int64(8))


class Boom:
    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds none of the arrays"),
        ({"other": GOOD}, "holds none of the arrays"),
        ({"train": GOOD}, "train_n"),
        ({"train": GOOD, "train_n": npy(np.int64(0))}, "train_n is 0"),
        ({"train": GOOD, "train_n": npy(np.int64(-8))}, "train_n is -8"),
        ({"train": GOOD, "train_n": npy(np.int64(9))}, "train_n is 9"),
        ({"train": GOOD, "train_n": npy(np.uint64(2**64 - 1))}, "train_n is 18446744073709551615"),
        ({"train": GOOD, "train_n": npy(np.array([8]))}, "one integer"),
        ({"train": GOOD, "train_n": npy(np.float64(8))}, "whole numbers"),
        ({"train": npy(np.zeros((2, 1), np.int32)), "train_n": EIGHT}, "packed uint8"),
        ({"train": npy(np.zeros(2, np.uint8)), "train_n": EIGHT}, "packed uint8"),
        ({"train": npy(np.zeros((0, 1), np.uint8)), "train_n": EIGHT}, "packed uint8"),
        ({"train": npy(np.array([[Boom()]]), pickle=True), "train_n": EIGHT}, "train is object"),
        ({"train": header((1 << 40, 1 << 20)), "train_n": EIGHT}, "claims shape"),
        ({"train": header((2, 1), body=b"\0"), "train_n": EIGHT}, "claims shape"),
        ({"train": header((-2, -1), body=b"\0\0"), "train_n": EIGHT}, "claims shape|not an .npz"),
        ({"train": header((2, 1), body=b"\0\0\0"), "train_n": EIGHT}, "claims shape"),
        ({"train": b"", "train_n": EIGHT}, "not an .npz"),
        ({"train": b"\x93NUMPY\x09\x00" + b"\0" * 99, "train_n": EIGHT}, "version"),
        ({"train": b"\x93NUMPY\x01\x00\x05\x00((((\n", "train_n": EIGHT}, "not an .npz"),
        ({"train": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 9999 + b"\n", "train_n": EIGHT}, "not an .npz"),
        (
            {"train": GOOD, "train_n": EIGHT, "test": npy(np.zeros((2, 2), np.uint8)), "test_n": npy(np.int64(9))},
            "widths",
        ),
    ],
)
def test_hostile_npz(tmp_path, members, message):
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as z:
        for name, raw in members.items():
            z.writestr(f"{name}.npy", raw)
    with pytest.raises(DataError, match=message):
        binary_splits("debd/t", str(tmp_path))


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmask_flwr.data.binary._MAX_CELLS", 1000)
    np.savez_compressed(tmp_path / "t.npz", **packed(train=np.zeros((8000, 2), np.uint8)))
    with pytest.raises(DataError, match="unpacks to"):
        binary_splits("debd/t", str(tmp_path))
    np.savez_compressed(tmp_path / "t.npz", **packed(train=np.zeros((300, 4), np.uint8)))
    with pytest.raises(DataError, match="train_n is 4"):
        binary_splits("debd/t", str(tmp_path))
    write_text(tmp_path, "u", train=np.zeros((800, 2), np.uint8))
    with pytest.raises(DataError, match="3200 bytes"):
        binary_splits("debd/u", str(tmp_path))


@given(at=st.integers(0, 10_000), byte=st.integers(1, 255), cut=st.booleans())
def test_any_damage_is_a_data_error_or_harmless(tmp_path_factory, at, byte, cut):
    folder = tmp_path_factory.mktemp("damage")
    f = io.BytesIO()
    np.savez_compressed(f, **packed(train=bits(20, 9)))
    raw = bytearray(f.getvalue())
    at %= len(raw)
    if cut:
        del raw[at:]
    else:
        raw[at] ^= byte
    (folder / "t.npz").write_bytes(raw)
    try:
        got = binary_splits("debd/t", str(folder))
    except DataError:
        return
    np.testing.assert_array_equal(got["train"], bits(20, 9))


def test_the_plain_npz_set_refuses_such_headers_too(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.npz", "w") as z:
        z.writestr("x.npy", b"\x93NUMPY\x01\x00\x05\x00((((\n")
    with pytest.raises(DataError, match="not an"):
        load("npz", "train", str(tmp_path))


def test_names_and_missing_files(tmp_path):
    for name in ("debd/", "debd/../x", "debd/a/b", "debd/.x", "adult", "debd/x\n"):
        with pytest.raises(DataError, match="write debd/NAME"):
            binary_splits(name, str(tmp_path))
    with pytest.raises(DataError, match="write debd/NAME"):
        load("debd/../x", "train", str(tmp_path))
    with pytest.raises(DataError, match=r"no gone.train.data and no gone.npz in .*--data-dir"):
        load("debd/gone", "train", str(tmp_path))
    write_text(tmp_path, "one", valid=bits(1, 3))
    with pytest.raises(DataError, match="one row"):
        load("debd/one", "train", str(tmp_path))
