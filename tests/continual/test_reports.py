"""What a continual run came to: forgetting, who helped whom, and ``fedmask report`` on its folder."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedmask_flwr.cli import app
from fedmask_flwr.continual.figures import attention, forgetting, latest, task_ends

TASKS, EACH = 3, 4
ROUNDS = TASKS * EACH
# Loss of task j (row) at the end of task t (column).
LOSS = [[20.0, 21.0, 23.5], [90.0, 30.0, 29.0], [99.0, 95.0, 40.0]]
RIGHT = [[0.9, 0.8, 0.5], [0.1, 0.75, 0.8], [0.0, 0.1, 0.7]]


def line(number, **more):
    return {"round": number, "uplink_bytes": 10, **more}


def evaluated(number, task, accuracy=False):
    """The line of the last round of a task."""
    more = {f"client_loss_task_{j}": LOSS[j][task] for j in range(task + 1)}
    met = [LOSS[j][task] for j in range(task + 1)]
    more |= {"client_loss_new": met[-1], "client_loss_base": met[0], "client_loss": sum(met) / len(met)}
    more |= {"client_loss_mixture": sum(met) / len(met) + 0.5, "client_loss_latest": 110.0 + task}
    if accuracy:
        right = [RIGHT[j][task] for j in range(task + 1)]
        more |= {f"client_accuracy_task_{j}": a for j, a in enumerate(right)}
        more |= {"client_accuracy_new": right[-1], "client_accuracy_base": right[0]}
        more |= {"client_accuracy": sum(right) / len(right)}
    return line(number, **more)


def lines(accuracy=False):
    return [
        evaluated(r, r // EACH - 1, accuracy) if r % EACH == 0 else line(r, client_loss_new=None)
        for r in range(1, ROUNDS + 1)
    ]


def folder(path, metrics, **config):
    path.mkdir(parents=True, exist_ok=True)
    settings = {"method": "confedmade", "num-server-rounds": ROUNDS, "scenario": "", "seed": 7} | config
    (path / "config.json").write_text(json.dumps(settings))
    (path / "metrics.jsonl").write_text("".join(json.dumps(found) + "\n" for found in metrics))
    return path


def report(path):
    done = CliRunner().invoke(app, ["report", str(path)], env={"COLUMNS": "80"})
    return done.exit_code, " ".join(done.output.split())


# Forgetting


def test_forgetting_by_hand():
    """Task 0: 23.5 - 20; task 1: 29 - 30. The last task cannot have been forgotten."""
    assert forgetting(lines()) == {"loss": pytest.approx((3.5 - 1) / 2)}
    found = forgetting(lines(accuracy=True))
    assert found["accuracy"] == pytest.approx((0.4 - 0.05) / 2)
    assert forgetting(lines()[: 2 * EACH]) == {"loss": pytest.approx(1.0)}
    assert forgetting(lines()[:EACH]) == {}
    assert forgetting([]) == {}


@given(
    values=st.lists(st.lists(st.floats(0, 100), min_size=3, max_size=3), min_size=2, max_size=6),
    sign=st.sampled_from(["loss", "accuracy"]),
)
def test_forgetting_equals_its_slow_twin(values, sign):
    found = [
        {"round": r, **{f"client_{sign}_task_{j}": v for j, v in enumerate(row)}} for r, row in enumerate(values)
    ]
    expected = 0.0
    for j in range(2):
        column = [row[j] for row in values]
        expected += column[-1] - min(column[:-1]) if sign == "loss" else max(column[:-1]) - column[-1]
    assert forgetting(found)[sign] == pytest.approx(expected / 2)


def test_rounds_without_an_evaluation_do_not_count():
    found = [*lines(), line(ROUNDS + 1), line(ROUNDS + 2, client_loss_task_0=None, client_loss_task_1=float("nan"))]
    assert forgetting(found) == forgetting(lines())


def test_task_ends():
    assert task_ends(lines(), TASKS, ROUNDS) == [(0, 3), (1, 7), (2, 11)]
    assert task_ends(lines()[:7], TASKS, ROUNDS) == [(0, 3)]
    each = [line(r, client_loss_new=1.0) for r in range(1, ROUNDS + 1)]
    assert task_ends(each[:6], TASKS, ROUNDS) == [(0, 3), (1, 5)]  # the run has not come further


# Attention


def test_attention_is_a_matrix():
    found = attention([[1, 0, 0, 0, 0.5], [0, 1, 0, 0, 9.0], [0, 1, 2, 0, -0.25], [0, 1, 0, 0, 0.125]])
    assert found.learners == ((0, 1), (1, 0))
    assert found.owners == ((0, 0), (2, 0))
    assert np.array_equal(found.alpha, [[0.125, -0.25], [0.5, np.nan]], equal_nan=True)
    assert attention([]).alpha.shape == (0, 0)


def test_a_later_report_replaces_the_whole_earlier_one():
    """An entry that was evicted since helps nobody any more."""
    first = line(1, attention=[[0, 1, 0, 0, 0.1], [0, 1, 2, 0, 0.2], [1, 1, 0, 0, 0.3]])
    then = line(2, attention=[[0, 1, 0, 0, 0.4]])
    rows = latest([first, then, line(3), line(4, attention=None)])
    assert sorted(rows) == [[0, 1, 0, 0, 0.4], [1, 1, 0, 0, 0.3]]


@pytest.mark.parametrize(
    "row",
    [7, [0, 1, 0, 0], [0, 1, 0, 0, "x"], [0, 1, 0, 0, float("nan")], [-1, 1, 0, 0, 0.5], [0, True, 0, 0, 0.5]],
)
def test_rows_that_are_none(row, tmp_path):
    with pytest.raises(ValueError, match=r"no row|finite"):
        attention([row])
    code, said = report(folder(tmp_path, [line(1, attention=[row])]))
    assert (code, "metrics.jsonl is damaged" in said) == (1, True)


# fedmask report


def test_report_of_a_density_model_s_run(tmp_path):
    metrics = lines()
    metrics[5]["attention"] = [[0, 1, 1, 0, 0.9], [0, 1, 2, 0, 0.8]]
    metrics[7]["attention"] = [[0, 1, 1, 0, 0.15], [0, 1, 2, 0, -0.3], [1, 1, 2, 0, 0.02]]
    code, said = report(folder(tmp_path, metrics))
    assert code == 0
    assert "task round new base average mixture latest forgetting" in said
    assert "0 4 20.000 20.000 20.000 20.500 110.000 -" in said
    assert "1 8 30.000 21.000 25.500 26.000 111.000 1.000" in said
    assert "2 12 40.000 23.500 30.833 31.333 112.000 1.250" in said
    assert "learned c1 t0 c2 t0 c0 t1 +0.15 -0.30 c1 t1 +0.02" in said
    assert "Accuracy" not in said
    page = (tmp_path / "report.md").read_text()
    assert "| 2 | 12 | 40.000 | 23.500 | 30.833 | 31.333 | 112.000 | 1.250 |" in page
    assert "| c0 t1 | **+0.15** | -0.30 |" in page
    assert "| c1 t1 |  | **+0.02** |" in page
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_classifier_s_run(tmp_path):
    code, said = report(folder(tmp_path, lines(accuracy=True)))
    assert code == 0
    assert "Accuracy task round new base average forgetting" in said
    assert "2 12 0.7000 0.5000 0.6667 0.1750" in said
    assert "Loss, nats" in said
    assert not (tmp_path / "attention.png").exists()
    assert "## Attention" not in (tmp_path / "report.md").read_text()


def test_all_tasks_may_be_evaluated_from_the_start(tmp_path):
    """Whether lines name tasks that nobody has met yet does not matter: rounds say what has been."""
    metrics = lines()
    for t in range(TASKS):
        metrics[EACH * (t + 1) - 1] |= {f"client_loss_task_{j}": LOSS[j][t] for j in range(TASKS)}
    code, said = report(folder(tmp_path, metrics))
    assert (code, "1 8 30.000 21.000 25.500 26.000 111.000 1.000" in said) == (0, True)


def test_a_run_that_is_under_way_is_told_by_its_scenario(tmp_path):
    """After 4 of 12 rounds the metrics name one task; the scenario says that there are three."""
    table = tmp_path / "three.toml"
    table.write_text('clients = [["mnist[0]", "mnist[1]", "mnist[2]"]]\n')
    code, said = report(folder(tmp_path / "run", lines()[:5], scenario=str(table)))
    assert (code, "0 4 20.000" in said) == (0, True)
    code, said = report(folder(tmp_path / "run", lines()[:5], scenario="gone.toml"))
    assert (code, "0 4 20.000" in said) == (0, True)


def test_many_owners_are_ranked(tmp_path):
    rows = [[0, 3, owner, task, 0.01 * (4 * owner + task)] for owner in range(4) for task in range(3)]
    code, said = report(folder(tmp_path, [line(1, attention=[*rows, [1, 3, 0, 0, -0.1]])]))
    assert code == 0
    assert "who helped most, of 12" in said
    assert "c0 t3 c3 t2 +0.14 c3 t1 +0.13 c3 t0 +0.12 c2 t2 +0.10" in said
    assert "c1 t3 c0 t0 -0.10" in said
    assert "**+0.14**" in (tmp_path / "report.md").read_text()


def test_folders_that_cannot_be_reported(tmp_path):
    plain = folder(tmp_path / "plain", [line(1, accuracy_threshold=0.5, client_accuracy_mean=0.5)])
    code, said = report(plain)
    assert (code, "only continual runs have" in said) == (1, True)
    assert not (plain / "report.md").exists()
    code, said = report(folder(tmp_path / "begun", []))
    assert (code, "no complete round yet" in said) == (1, True)
    for text in ("{", "[]"):
        (plain / "config.json").write_text(text)
        code, said = report(plain)
        assert (code, "cannot be read" in said or "damaged" in said) == (1, True)
    code, said = report(folder(tmp_path / "odd", lines(), **{"num-server-rounds": "x"}))
    assert (code, "not a number of rounds" in said) == (1, True)
    code, said = report(tmp_path / "none")
    assert (code, "holds no comparison" in said) == (1, True)


def test_without_matplotlib_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, said = report(folder(tmp_path, [line(1, attention=[[0, 1, 1, 0, 0.5]])]))
    assert (code, "pip install 'fedmask-flwr[sim]'" in said) == (0, True)
    assert (tmp_path / "report.md").exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedmask_flwr.continual.report.write_atomic", full)
    code, said = report(folder(tmp_path, lines()))
    assert (code, "No space left" in said) == (1, True)


def test_drawing_needs_no_display(tmp_path):
    """No pyplot, whose state is global."""
    code = (
        "import sys; from pathlib import Path; from fedmask_flwr.continual.figures import attention;"
        "from fedmask_flwr.continual.report import draw;"
        f"draw(attention([[0, 1, 0, 0, 0.0]]), Path({str(tmp_path / 'a.png')!r}));"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
