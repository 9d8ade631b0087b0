"""Scenarios: tables of cells, and that their examples are dealt once."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.config import ConfigError
from fedmask_flwr.data import (
    SCENARIOS,
    Cell,
    DataError,
    Scenario,
    cell_data,
    load,
    scenario,
    shape_of,
)

OWN = "own_scenario_data"
# Every example is its own number (the test split's are negative), 40 of each of 4 classes.
SOURCE = """
import numpy as np
from fedmask_flwr.data import Dataset
def rows(split, data_dir):
    y = np.arange(160) % 4
    x = np.arange(1, 161, dtype=np.float32)[:, None] * (1 if split == "train" else -1)
    return x, y
def wide(split, data_dir):
    return np.full((12, 5), 0.75, np.float32), np.arange(12) % 2
def padded(split, data_dir):
    return Dataset(np.full((12, 4), 0.25, np.float32), np.arange(12) % 2, 6, valid=3, labels=(0, 1, 5))
def image(split, data_dir):
    return np.ones((12, 1, 2, 2), np.float32), np.arange(12) % 2
def late(split, data_dir):
    return np.ones((12, 1), np.float32), np.arange(12) % (2 if split == "train" else 3)
def larger(split, data_dir):
    return np.ones((12, 2 if split == "train" else 3), np.float32), np.arange(12) % 2
def bad_valid(split, data_dir):
    return Dataset(np.ones((12, 4), np.float32), np.arange(12) % 2, 2, valid=5)
def bad_labels(split, data_dir):
    return Dataset(np.ones((12, 4), np.float32), np.arange(12) % 2, 2, labels=(0,))
"""


@pytest.fixture(scope="module", autouse=True)
def _own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / f"{OWN}.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


def table(*rows, **rest):
    return Scenario("t", tuple(tuple(own(word) for word in row.split()) for row in rows), **rest)


def own(word):
    name, _, classes = word.partition("[")
    return Cell(f"{OWN}:{name}", tuple(map(int, classes.rstrip("]").split(","))) if classes else ())


def values(s, client, task, split, **rest):
    return set(cell_data(s, client, task, split, **rest).x[:, 0].tolist())


TABLES = [
    table("rows[0,1] rows[2,3]", "rows[2,3] rows[0,1]"),
    table("rows rows[3]", "rows[0,3] rows"),
    table("rows rows rows rows rows", limit=7),
]


@pytest.mark.parametrize("s", TABLES)
@pytest.mark.parametrize("seed", [0, 5])
def test_no_row_is_in_two_cells_and_all_are_dealt(s, seed):
    everything = [(c, t) for c in range(s.clients) for t in range(s.tasks)]
    for splits, sign in ((("train", "valid"), 1), (("test",), -1)):
        seen = [v for c, t in everything for split in splits for v in values(s, c, t, split, seed=seed)]
        assert len(seen) == len(set(seen))
        if s.limit == 0 or splits == ("test",):
            assert set(seen) == {sign * float(i) for i in range(1, 161)}


@pytest.mark.parametrize("s", TABLES)
def test_a_cell_has_its_classes_evenly_and_a_sixth_validates(s):
    for c in range(s.clients):
        for t in range(s.tasks):
            train, valid, test = (cell_data(s, c, t, split, "", 1) for split in ("train", "valid", "test"))
            named = s.cells[c][t].classes
            assert train.labels == (named or None)
            for d in (train, valid, test):
                assert set(d.y.tolist()) <= set(named or range(4))
                np.testing.assert_array_equal((np.abs(d.x[:, 0]) - 1) % 4, d.y)
            for label in named or range(4):
                holders = sum(not cell.classes or label in cell.classes for row in s.cells for cell in row)
                assert (test.y == label).sum() in (40 // holders, -(-40 // holders))
            share = len(test)  # both splits have as many rows
            assert len(valid) == share // 6
            assert len(train) == min(share - share // 6, s.limit or share)


def test_the_deal_is_keyed_by_the_seed_and_does_not_depend_on_the_process(tmp_path):
    rows = np.unpackbits(np.arange(200, dtype=np.uint8)[:, None], axis=1)
    np.savetxt(tmp_path / "a.valid.data", rows, "%d", delimiter=",")
    file, folder = written(tmp_path, 'clients = [["debd/a", "debd/a"], ["debd/a", "debd/a"]]'), str(tmp_path)
    code = (
        f"import hashlib; from fedmask_flwr.data import cell_data, scenario; s = scenario({file!r});"
        f"x = [cell_data(s, c, 1, 'train', {folder!r}, 3).x for c in (1, 0)];"
        "print([hashlib.sha256(some.tobytes()).hexdigest() for some in x])"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    s = scenario(file)
    here = [hashlib.sha256(cell_data(s, c, 1, "train", folder, 3).x.tobytes()).hexdigest() for c in (0, 1)]
    assert there.strip() == str(here[::-1])
    assert not np.array_equal(cell_data(s, 0, 0, "test", folder, 3).x, cell_data(s, 0, 0, "test", folder, 4).x)
    assert cell_data(s, 0, 0, "train", folder, 3) is cell_data(s, 0, 0, "train", folder, 3)


def test_a_deal_is_pinned():
    got = [cell_data(TABLES[0], 1, 0, split, "", 7).x[:6, 0].astype(int).tolist() for split in ("valid", "test")]
    assert got == PINNED


PINNED = [[3, 52, 55, 63, 72, 76], [-8, -11, -12, -15, -20, -24]]


def test_the_limit_takes_part_of_the_same_rows():
    free, capped = table("rows rows[3]"), table("rows rows[3]", limit=5)
    assert len(values(capped, 0, 0, "train")) == 5
    assert values(capped, 0, 0, "train") < values(free, 0, 0, "train")
    assert values(capped, 0, 0, "valid") == values(free, 0, 0, "valid")
    assert values(capped, 0, 0, "test") == values(free, 0, 0, "test")


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_cumulative_is_all_cells_so_far(split):
    s = table("rows[0,1] rows[2] rows[0]", "rows rows rows")
    whole = cell_data(s, 0, 2, split, "", 1, cumulative=True)
    parts = [cell_data(s, 0, t, split, "", 1) for t in range(3)]
    np.testing.assert_array_equal(whole.x, np.concatenate([d.x for d in parts]))
    np.testing.assert_array_equal(whole.y, np.concatenate([d.y for d in parts]))
    assert (whole.labels, whole.num_classes, whole.valid) == ((0, 1, 2), 4, None)
    assert cell_data(s, 0, 1, split, "", 1, cumulative=True).labels == (0, 1, 2)
    assert cell_data(s, 0, 0, split, "", 1, cumulative=True) is parts[0]
    assert cell_data(s, 1, 2, split, "", 1, cumulative=True).labels is None


def test_flat_sets_are_padded_to_the_widest():
    s = table("rows wide padded")
    assert shape_of(s) == ((5,), 6)
    narrow, wide, padded = (cell_data(s, 0, t, "train") for t in range(3))
    assert (narrow.valid, wide.valid, padded.valid) == (1, None, 3)
    assert {d.num_classes for d in (narrow, wide, padded)} == {6}
    assert {d.in_shape for d in (narrow, wide, padded)} == {(5,)}
    assert (narrow.x[:, 0] > 0).all()
    assert not narrow.x[:, 1:].any()
    assert not padded.x[:, 4:].any()
    assert cell_data(s, 0, 1, "train", cumulative=True).valid is None
    same = table("padded[0] padded[1] wide")
    assert cell_data(same, 0, 1, "train", cumulative=True).valid == 3


def test_binary_thresholds_above_one_half():
    s = table("wide padded", binary=True)
    assert set(cell_data(s, 0, 0, "train").x.ravel().tolist()) == {1.0}
    assert not cell_data(s, 0, 1, "train").x.any()
    x = cell_data(Scenario("d", ((Cell("digits"),),), binary=True), 0, 0, "test").x
    np.testing.assert_array_equal(x, load("digits", "test").x * 16 > 8)  # pixels are 0 to 16
    assert x.dtype == np.float32


def test_binary_sets_are_cells(tmp_path):
    for name, width in (("a", 3), ("b", 5)):
        rows = np.random.default_rng(width).integers(0, 2, (70, width))
        np.savetxt(tmp_path / f"{name}.valid.data", rows, "%d", delimiter=",")
    file = tmp_path / "mine.toml"
    file.write_text('binary = true\nlimit = 20\nclients = [["debd/a", "debd/b"], ["debd/b", "debd/a"]]\n')
    s = scenario(str(file))
    assert (s.name, shape_of(s, str(tmp_path))) == ("mine", ((5,), 1))
    d = cell_data(s, 1, 1, "train", str(tmp_path), 1)
    assert (len(d), d.valid, d.in_shape, d.labels) == (20, 3, (5,), None)
    assert [len(cell_data(s, 1, 1, split, str(tmp_path), 1)) for split in ("valid", "test")] == [5, 5]


@pytest.mark.parametrize(
    ("s", "where", "message"),
    [
        (table("rows[0] rows[7]"), (0, 1), r"row 1, column 2 \(own_scenario_data:rows\[7\]\): class 7 has 0 rows"),
        (table(*["wide[0] wide[1,0]"] * 4), (3, 1), r"row 4, column 2 .*class 0 has 6 rows in the train .*8 cells"),
        (table(*["wide[0]"] * 6), (0, 0), "one training row"),
        (table("wide image"), (0, 0), r"mixes shapes .*wide \(5,\)"),
        (table("late"), (0, 0), "class 2 is in the test split and not in training"),
        (table("larger"), (0, 0), r"examples of shape \(3,\), in training \(2,\)|more inputs"),
        (table("nothing"), (0, 0), "PYTHONPATH"),
        (table("bad_valid"), (0, 0), "valid is 5; use 1 to 4"),
        (table("bad_labels"), (0, 0), "cover every y"),
    ],
)
def test_cells_that_cannot_be(s, where, message):
    with pytest.raises(DataError, match=message):
        for split in ("train", "valid", "test"):
            cell_data(s, *where, split)


@pytest.mark.parametrize(
    "args", [(1, 0, "train"), (-1, 0, "train"), (0, 3, "train"), (0, -1, "test"), (0, 0, "dev")]
)
def test_out_of_range(args):
    with pytest.raises(ValueError, match=r"client .* of 1, task .* of 3"):
        cell_data(table("rows rows rows"), *args)


def test_task_at():
    s = table("rows rows rows", "rows rows rows", "rows rows rows", lag=1)
    assert [s.task_at(0, r, 6) for r in range(1, 7)] == [0, 0, 1, 1, 2, 2]
    assert [s.task_at(1, r, 6) for r in range(1, 7)] == [0, 0, 0, 1, 1, 2]
    assert [s.task_at(2, r, 6) for r in range(1, 7)] == [0, 0, 0, 0, 1, 1]
    assert s.task_at(0, 9, 6) == 2
    for rounds in (0, 7):
        with pytest.raises(ConfigError, match=f"num-server-rounds is {rounds}; .* 3 tasks"):
            s.task_at(0, 1, rounds)
    for client, round_ in ((3, 1), (-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="client"):
            s.task_at(client, round_, 6)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_a_later_client_does_what_the_first_did_lag_rounds_ago(clients, tasks, each, lag):
    s = Scenario("s", ((Cell("digits"),) * tasks,) * clients, lag=lag)
    for c in range(clients):
        for r in range(1, tasks * each + 1):
            assert s.task_at(c, r, tasks * each) == s.task_at(0, max(1, r - lag * c), tasks * each)


def columns(name):
    s = scenario(name)
    return ["".join(",".join(map(str, row[t].classes)) + " " for row in s.cells).strip() for t in range(s.tasks)]


def test_built_ins_are_the_published_tables():
    assert columns("mnist-3x5") == ["0 1 2", "3 4 5", "6 7 8", "9 0 1", "2 3 4"]
    assert columns("mnist-overlap") == ["1 6 5 3", "3 5 6 1"]
    latin = scenario("debd-latin")
    assert [[c.data.removeprefix("debd/")[0] for c in row] for row in latin.cells] == [
        list("tacr"),
        list("rcta"),
        list("crat"),
        list("atrc"),
    ]
    assert latin.limit == 2000
    assert {name for name in SCENARIOS if scenario(name).binary} == {"mnist-3x5", "mnist-overlap", "debd-latin"}


@pytest.mark.parametrize("name", ["debd-latin", "mnist-split", "cifar10-split", "digits-split"])
def test_latin_squares(name):
    cells = scenario(name).cells
    everything = set(cells[0])
    assert len(everything) == len(cells) == len(cells[0])
    assert all(set(row) == everything for row in cells)
    assert all({row[t] for row in cells} == everything for t in range(len(cells)))


def test_mnist_split_reads_idx_files(tmp_path):
    for stem, n in (("train", 300), ("t10k", 100)):
        head = bytes((0, 0, 8, 3)) + np.array([n, 2, 2], ">u4").tobytes()
        pixels = np.repeat(np.arange(n, dtype=np.uint8), 4)
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = np.arange(n, dtype=np.uint8) % 10
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(
            bytes((0, 0, 8, 1)) + np.array([n], ">u4").tobytes() + labels.tobytes()
        )
    s = scenario("mnist-split")
    assert shape_of(s, str(tmp_path)) == ((1, 2, 2), 10)
    d = cell_data(s, 1, 0, "train", str(tmp_path))
    assert (len(d), d.labels, set(d.y.tolist())) == (10, (2, 3), {2, 3})
    dense = cell_data(scenario("mnist-3x5"), 0, 0, "test", str(tmp_path))
    assert (len(dense), dense.labels) == (5, (0,))
    assert set(dense.x.ravel().tolist()) <= {0.0, 1.0}


def written(tmp_path, text):
    path = tmp_path / "table.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_table_of_ones_own(tmp_path):
    s = scenario(
        written(
            tmp_path,
            'lag = 2\nclients = [\n  ["mnist[1, 0]", "digits"],\n'
            '  ["my.module:function[2]", "debd/pumsb_star"],\n]\n',
        )
    )
    assert s.cells == (
        (Cell("mnist", (0, 1)), Cell("digits")),
        (Cell("my.module:function", (2,)), Cell("debd/pumsb_star")),
    )
    assert (s.name, s.lag, s.limit, s.binary, s.clients, s.tasks) == ("table", 2, 0, False, 2, 2)
    assert [str(c) for c in s.cells[0]] == ["mnist[0,1]", "digits"]
    assert hash(s) == hash(scenario(str(tmp_path / "table.toml")))


ONE = 'clients = [["digits"]]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "clients must be rows"),
        ("clients = []", "clients must be rows"),
        ("clients = [[]]", "clients must be rows"),
        ('clients = ["digits"]', "clients must be rows"),
        ("clients = 3", "clients must be rows"),
        ('clients = [["digits", "digits"], ["digits"]]', "row 2 has 1 columns, and row 1 has 2"),
        ('clients = [["digits", 3]]', "row 1, column 2: 3 is no cell"),
        ('clients = [["digits"], [["digits"]]]', "row 2, column 1: .* is no cell"),
        ('clients = [["minst[0]"]]', "row 1, column 1: unknown data set 'minst'; use one of digits, mnist"),
        ('clients = [["debd/../x"]]', "row 1, column 1: unknown data set"),
        ('clients = [["digits[]"]]', "row 1, column 1: classes ''; write"),
        ('clients = [["digits[0,]"]]', "classes '0,'; write"),
        ('clients = [["digits[-1]"]]', "classes '-1'; write"),
        ('clients = [["digits[0.5]"]]', "classes '0.5'; write"),
        ('clients = [["digits[\u0663]"]]', "classes '\u0663'; write"),
        ('clients = [["digits[9999999999]"]]', "classes '9999999999'; write"),
        ('clients = [["digits[0,0]"]]', "a class is there twice in '0,0'"),
        ('clients = [["digits[0"]]', "is no cell"),
        ('clients = [["digits[0][1]"]]', "is no cell"),
        ('clients = [[""]]', "is no cell"),
        (ONE + "lags = 1", "unknown key lags; the keys are binary, clients, lag, limit"),
        (ONE + "[more]", "unknown key more"),
        (ONE + "lag = -1", "lag is -1; use a whole number"),
        (ONE + "lag = 1.0", "lag is 1.0; use a whole number"),
        (ONE + "limit = true", "limit is True; use a whole number"),
        (ONE + "limit = 99999999999", "limit is 99999999999; use"),
        (ONE + "binary = 1", "binary is 1; use true or false"),
        (ONE + "limit = " + "9" * 5000, "is not TOML"),
        ("clients = [[", "is not TOML"),
        (b"clients = [['\xff']]", "is not TOML"),
        ("clients = " + "[" * 100_000, "is not TOML"),
        (ONE + "#" * (1 << 20), "is larger than 1048576 bytes"),
    ],
)
def test_hostile_tables(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        scenario(written(tmp_path, text))


def test_unknown_and_missing_tables(tmp_path):
    with pytest.raises(ConfigError, match="unknown scenario 'mnist-3x4'; use one of mnist-3x5, "):
        scenario("mnist-3x4")
    with pytest.raises(ConfigError, match="does not exist on this machine"):
        scenario(str(tmp_path / "gone.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match="is not TOML"):
        scenario(str(tmp_path / "folder.toml"))
    with pytest.raises(ConfigError, match="is not TOML"):
        scenario("a\0b.toml")
