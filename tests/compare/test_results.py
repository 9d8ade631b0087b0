"""What a comparison adds up to, against a slow reading of the words in docs/compare.md."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedmask_flwr.compare import CompareError, Run, read, write
from fedmask_flwr.compare.plot import curves, plot
from fedmask_flwr.compare.report import summarise, terminal_tables
from fedmask_flwr.compare.results import INDEX, Result, enrol, figures, fits, mark, over_seeds

NUMBERS = st.integers(0, 10**6)
LINES = st.fixed_dictionaries(
    {"uplink_bytes": NUMBERS, "downlink_bytes": NUMBERS, "evaluate_bytes": NUMBERS,
     "clients_failed": st.integers(0, 3), "evaluations_failed": st.integers(0, 3), "clients_ok": st.integers(0, 3),
     "uplink_bpp": st.floats(0, 32), "seconds": st.floats(0, 100)},
    optional={"accuracy_threshold": st.floats(0, 1), "client_accuracy_mean": st.floats(0, 1),
              "client_model_bits": st.floats(1, 1e9)},
)  # fmt: skip


def numbered(lines):
    return [{"round": number, **line} for number, line in enumerate(lines, 1)]


def oracle(rows):
    found = {}
    for name in ("uplink_bytes", "downlink_bytes", "evaluate_bytes", "clients_failed", "evaluations_failed"):
        total = 0
        for row in rows:
            total += row[name]
        found[name] = total
    seconds, bits = [], []
    for row in rows:
        seconds.append(row["seconds"])
        if row["clients_ok"]:
            bits.append(row["uplink_bpp"])
    found["seconds"] = float(np.median(seconds))
    if bits:
        found["uplink_bpp"] = sum(bits) / len(bits)
    for name in ("accuracy_threshold", "client_accuracy_mean", "client_model_bits"):
        if name in rows[-1]:
            found[name] = rows[-1][name]
    return found


@given(st.lists(LINES, min_size=1, max_size=5).map(numbered))
def test_figures_of_one_run(rows):
    assert figures(rows) == pytest.approx(oracle(rows))


def test_figures_of_nothing():
    assert figures([]) == {}
    assert over_seeds([]) == {}


@given(st.lists(st.lists(LINES, min_size=1, max_size=3).map(numbered), min_size=1, max_size=4))
def test_means_over_seeds(runs):
    found = over_seeds([figures(rows) for rows in runs])
    for name, (mean, low, high) in found.items():
        values = np.array([oracle(rows)[name] for rows in runs])
        assert (mean, low, high) == pytest.approx((values.mean(), values.min(), values.max()))
    assert {"uplink_bytes", "seconds"} <= found.keys()
    assert ("accuracy_threshold" in found) == all("accuracy_threshold" in rows[-1] for rows in runs)


def result(label="a", seed=1, rows=(), complete=True, error="", settings=None, config=None):
    own = settings or {}
    return Result(label, label, own, seed, f"{label}-s{seed}", error, complete, config or {}, list(rows))


def line(number, accuracy, up=100, down=200, **more):
    return {
        "round": number, "uplink_bytes": up, "downlink_bytes": down, "accuracy_threshold": accuracy,
        "clients_ok": 3, "clients_failed": 1, "evaluations_failed": 0, "uplink_bpp": 1.0, "seconds": 2.0, **more,
    }  # fmt: skip


def test_only_complete_runs_count():
    rows = [line(1, 0.5), line(2, 0.75)]
    runs = [result(rows=rows), result(seed=2, rows=rows[:1], complete=False, error="OSError: disk")]
    runs += [result("b", rows=[], complete=False)]
    a, b = summarise(runs)
    assert (a.seeds, a.figures["accuracy_threshold"], a.failures) == ((1,), (0.75, 0.75, 0.75), 2)
    assert a.missing == ("seed 2: OSError: disk",)
    assert (b.seeds, b.figures, b.missing) == ((), {}, ("seed 1: not complete",))


def test_curves():
    a = [result(rows=[line(1, 0.5), line(2, 0.75)]), result(seed=2, rows=[line(1, 0.3, up=300), line(2, 0.65)])]
    b = result("b", rows=[{k: v for k, v in line(1, 0.0).items() if k != "accuracy_threshold"}])
    found = curves([*a, b], "accuracy_threshold")
    assert found.keys() == {"a"}
    np.testing.assert_allclose(found["a"], [[400, 0.4, 0.3, 0.5], [700, 0.7, 0.65, 0.75]])


def test_pictures_of_many_and_of_none(tmp_path):
    runs = [
        result(
            f"_method {m} [x] $\\bad{{$", seed, [line(r, r / 10, up=m, client_accuracy_mean=0.5) for r in (1, 2)]
        )
        for m in range(24)
        for seed in (1, 2)
    ]
    plot(runs, tmp_path / "many.png", "title")
    plot([], tmp_path / "none.png")
    plot([result(rows=[line(1, 0.5, up=0, down=0)])], tmp_path / "one.png")
    for name in ("many", "none", "one"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# The folder


def planned(label, seed, settings=None, **config):
    own = settings or {}
    whole = {"method": label, "seed": seed, "num-server-rounds": 2, "data": "digits", **own, **config}
    return Run(label, label, own, seed, f"{label}-s{seed}", whole)


def ran(out, run, rows, done=True):
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(run.config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "checkpoint.safetensors").write_bytes(b"x")
    if done:
        (folder / "mask.fedmask").write_bytes(b"x")


def test_a_folder_s_report(tmp_path):
    a = [planned("a|b", seed) for seed in (1, 2)]
    b = planned("b", 1, {"kappa": 0.5})
    enrol(tmp_path, [*a, b])
    personal = {"client_accuracy_mean": 0.5, "client_accuracy_worst_decile": 0.25, "client_model_bits": 8e6}
    ran(tmp_path, a[0], [line(1, 0.1), line(2, 0.5, **personal)])
    ran(tmp_path, a[1], [line(1, 0.1), line(2, 0.7, **personal, up=300)])
    ran(tmp_path, b, [line(1, 0.1)], done=False)
    mark(tmp_path, b.folder, "ValueError: a\nb")
    summaries = write(tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| `a\\|b` | 2 | - | 0.6000 (0.5000 to 0.7000) | - | 0.5000 | 0.2500 | 300 B (200 B to 400 B)" in table
    assert "| 400 B | 1.0000 | 1 MB | 2 | 4 |" in table
    assert "- `b`, seed 1: ValueError: a b" in table
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert kept["settings"] == {"num-server-rounds": 2, "data": "digits"}
    assert kept["methods"][0]["figures"]["accuracy_threshold"] == {"mean": 0.6, "min": 0.5, "max": 0.7}
    assert [(run["label"], run["complete"], len(run["rounds"])) for run in kept["runs"]] == [
        ("a|b", True, 2), ("a|b", True, 2), ("b", False, 1)
    ]  # fmt: skip
    assert (tmp_path / "compare.png").exists()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*terminal_tables(summaries))
    said = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert said == [
        "method seeds threshold clients worst 10%", "a|b 2 0.6000 0.5000 0.2500", ".500-.700", "b 0 - - -",
        "method up down bpp up on device s/round failures", "a|b 300 B 400 B 1.0000 1 MB 2 4", "200-400",
        "b - - - - - 0",
    ]  # fmt: skip


def test_runs_that_differ_in_more_are_no_comparison(tmp_path):
    first = planned("a", 1)
    enrol(tmp_path, [first])
    ran(tmp_path, first, [line(1, 0.1), line(2, 0.5)])
    for other in (planned("b", 1, data="mnist"), planned("b", 1, **{"num-server-rounds": 3})):
        with pytest.raises(CompareError, match=r"others .*--overwrite"):
            fits(tmp_path, [other])
    fits(tmp_path, [planned("b", 1, {"data": "own"})])  # its entry says so
    second = planned("b", 1)
    enrol(tmp_path, [second])
    ran(tmp_path, second, [line(1, 0.1), line(2, 0.5)])
    assert [found.label for found in read(tmp_path)] == ["a", "b"]
    config = json.loads((tmp_path / "b-s1/config.json").read_text()) | {"data": "mnist"}
    (tmp_path / "b-s1/config.json").write_text(json.dumps(config))
    with pytest.raises(CompareError, match="b has data = 'mnist', others 'digits'"):
        read(tmp_path)


def test_a_run_without_a_round_binds_nobody(tmp_path):
    first = planned("a", 1, data="mnist")
    enrol(tmp_path, [first])
    ran(tmp_path, first, [], done=False)
    fits(tmp_path, [planned("b", 1)])


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"runs": 1}', '{"runs": [1]}', '{"runs": [{"folder": "../x"}]}',
     *(f'{{"runs": [{{"folder": "{bad}", "settings": {{}}, "label": "a", "method": "a", "seed": 1, "error": ""}}]}}'
       for bad in ("..", "", "a/../..")),
     '{"runs": [{"folder": "a", "settings": {}, "label": 1, "method": "a", "seed": 1, "error": ""}]}'],
)  # fmt: skip
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CompareError, match="is damaged"):
        read(tmp_path)


def test_no_comparison(tmp_path):
    with pytest.raises(CompareError, match="holds no comparison"):
        read(tmp_path)
