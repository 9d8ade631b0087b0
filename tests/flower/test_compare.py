"""The server of a comparison, on the real apps, through Flower's own types, in one process."""

from __future__ import annotations

import fcntl
import json

import pytest
import tiny
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid

import client_app.main
from fedmask_flwr.compare import CompareError, lineup, read
from fedmask_flwr.compare import report as reports
from fedmask_flwr.config import ConfigError
from fedmask_flwr.flower import apps
from fedmask_flwr.flower import compare as server
from fedmask_flwr.methods.fedpm import FedPM
from fedmask_flwr.track import RunDirError
from server_app.main import main

pytestmark = pytest.mark.flower
TEXT = "deltamask(kappa=1.0 learning-rate=0.1), standalone(learning-rate=0.05)"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


class Dying(LoopbackGrid):
    """Dies instead of sending the training messages after so many rounds."""

    left = 10**6

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if any(m.metadata.message_type == "train" for m in messages):
            if self.left == 0:
                raise Killed
            self.left -= 1
        return super().send_and_receive(messages, timeout=timeout)


def compare(out, text=TEXT, seeds="1,2", first_node=100, left=10**6, **changes):
    """Serve a comparison into ``out``; return the grid."""
    told = {"out": str(out), "memory_dir": str(out / "memory"), "compare": text, "seeds": seeds, **changes}
    config = tiny.run_config(**{"num_server_rounds": 3, **told})
    grid = Dying(client_app.main.app, 3, config, None, first_node)
    grid.left = left
    main(grid, Context(1, 1, {}, RecordDict(), config))
    return grid


def trained(grid):
    return sum(m.metadata.message_type == "train" for m in grid.messages)


def without_clock(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two methods, two seeds, in one go."""
    out = tmp_path_factory.mktemp("whole")
    compare(out)
    return out


def test_each_run_is_what_serve_gives(whole, tmp_path):
    runs = lineup(tiny.run_config(num_server_rounds=3, compare=TEXT, seeds="1,2"))
    assert len(runs) == 4
    for run in runs:
        out = tmp_path / run.folder
        config = {**run.config, "out": str(out), "memory-dir": str(out / "memory")}
        grid = LoopbackGrid(client_app.main.app, 3, config, None, 4000)
        main(grid, Context(1, 1, {}, RecordDict(), config))
        for name in ("mask.fedmask", "checkpoint.safetensors"):
            assert (out / name).read_bytes() == (whole / run.folder / name).read_bytes()
        metrics = without_clock(out / "metrics.jsonl")
        assert metrics == without_clock(whole / run.folder / "metrics.jsonl")
        assert len(metrics) == 3
        # The folder can be read, and served, by itself.
        alone = json.loads((whole / run.folder / "config.json").read_text())
        assert alone == {**config, "out": str(whole / run.folder), "memory-dir": str(whole / "memory")}
    masks = {(whole / run.folder / "mask.fedmask").read_bytes() for run in runs if run.method == "deltamask"}
    assert len(masks) == 2


def test_the_table_and_the_picture(whole):
    delta, alone = json.loads((whole / "compare.json").read_text())["methods"]
    assert (delta["label"], delta["seeds"]) == ("deltamask(kappa=1.0 learning-rate=0.1)", [1, 2])
    assert delta["settings"] == {"kappa": 1.0, "learning-rate": 0.1}
    figures = delta["figures"]
    assert figures["accuracy_threshold"]["mean"] > 0.6
    assert figures["client_accuracy_worst_decile"]["max"] <= figures["client_accuracy_mean"]["max"]
    lines = [without_clock(whole / f"{delta_folder}/metrics.jsonl") for delta_folder in folders(whole)[:2]]
    means = [sum(line["uplink_bytes"] for line in run) for run in lines]
    assert figures["uplink_bytes"] == {"mean": sum(means) / 2, "min": min(means), "max": max(means)}
    assert "accuracy_threshold" not in alone["figures"]
    assert alone["figures"]["client_accuracy_mean"]["mean"] > 0.6
    assert alone["figures"]["uplink_bpp"]["mean"] < 0.5 * figures["uplink_bpp"]["mean"]
    assert (whole / "compare.png").stat().st_size > 10_000
    rows = [line for line in (whole / "table.md").read_text().splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[0] for row in rows] == [
        "| `deltamask(kappa=1.0 learning-rate=0.1)`",
        "| `standalone(learning-rate=0.05)`",
    ]
    assert " | 2 | - | - | - | " in rows[1]


def folders(out):
    return [found.folder for found in sorted(read(out), key=lambda found: (found.label, found.seed))]


def test_only_what_is_missing_runs(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/metrics.jsonl")}
    assert len(before) == 4
    assert trained(compare(whole)) == 0
    grid = compare(whole, "fedavg(learning-rate=0.1)", "2")
    assert trained(grid) == 9
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [found.complete for found in read(whole)] == [True] * 5
    assert "fedavg" in (whole / "table.md").read_text()


def test_a_killed_comparison_goes_on(whole, tmp_path):
    with pytest.raises(Killed):
        compare(tmp_path, left=3 + 2)  # in round 3 of the second run, a personal one
    assert [found.complete for found in read(tmp_path)] == [True, False, False, False]
    grid = compare(tmp_path, first_node=7000)
    assert trained(grid) == 3 * (1 + 3 + 3)
    for folder in [path.name for path in tmp_path.glob("*-s?")]:
        for name in ("mask.fedmask", "checkpoint.safetensors"):
            assert (tmp_path / folder / name).read_bytes() == (whole / folder / name).read_bytes()
        assert without_clock(tmp_path / folder / "metrics.jsonl") == without_clock(whole / folder / "metrics.jsonl")


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    real, broken = FedPM.aggregate, [True]

    def aggregate(self, state, updates):
        if broken:
            raise ArithmeticError("told to fail")
        return real(self, state, updates)

    monkeypatch.setattr(FedPM, "aggregate", aggregate)
    with pytest.raises(CompareError, match=r"1 of 2 runs failed: fedpm seed 5 \(ArithmeticError: told to fail\)"):
        compare(tmp_path, "fedpm, fedavg", "5", num_server_rounds=1)
    failed, fine = read(tmp_path)
    assert (failed.error, failed.complete, fine.error, fine.complete) == (
        "ArithmeticError: told to fail", False, "", True
    )  # fmt: skip
    assert "`fedpm`, seed 5: ArithmeticError: told to fail" in (tmp_path / "table.md").read_text()
    broken.clear()
    assert trained(compare(tmp_path, "fedpm, fedavg", "5", num_server_rounds=1)) == 3
    assert [(found.error, found.complete) for found in read(tmp_path)] == [("", True)] * 2
    assert "Not in the table" not in (tmp_path / "table.md").read_text()


def test_a_run_that_was_not_saved_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "federate", lambda *_: None)
    with pytest.raises(CompareError, match="its files were not saved"):
        compare(tmp_path, "fedpm", "5")


def test_no_room_for_the_table_costs_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reports, "write_atomic", full)
    compare(tmp_path, "fedpm", "5", num_server_rounds=1)
    assert read(tmp_path)[0].complete


@pytest.mark.parametrize("changes", [{"local_epochs": 1}, {"num_server_rounds": 2}, {"partition": "dirichlet"}])
def test_other_settings_are_refused_before_anything_runs(whole, changes):
    kept = (whole / "runs.json").read_bytes()
    with pytest.raises(CompareError, match=f"has {next(iter(changes)).replace('_', '-')} = .*use another folder"):
        compare(whole, "fedpm", "1", **changes)
    assert (whole / "runs.json").read_bytes() == kept


def test_a_text_that_cannot_be_read_starts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        compare(tmp_path / "a", "fedpm(")
    assert not (tmp_path / "a").exists()


def test_one_comparison_a_folder_at_a_time(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunDirError, match="another process is writing"):
            compare(tmp_path, "fedpm", "1")


def test_without_compare_it_is_one_run(tmp_path):
    compare(tmp_path, "", "", method="fedpm", num_server_rounds=1)
    assert (tmp_path / "mask.fedmask").exists()
    assert not (tmp_path / "runs.json").exists()
    assert apps.run_folder(Context(9, 1, {}, RecordDict(), {"out": ""})).parts[-2:] == ("runs", "9")
