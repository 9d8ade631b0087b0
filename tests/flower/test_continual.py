"""Whole continual runs: tasks told and found, and what devices report of them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from continual_runs import FILES, go, heard, meta, number, told
from flwr.app import MetricRecord, RecordDict
from loopback import LoopbackGrid
from rounds import frame_of
from safetensors.numpy import load_file

from fedmask_flwr.checkpoint import load_state
from fedmask_flwr.config import ConfigError
from fedmask_flwr.export import ExportError, read_run
from fedmask_flwr.flower.continual import met
from fedmask_flwr.flower.replies import MOST, finite
from fedmask_flwr.flower.strategy import MaskStrategy
from fedmask_flwr.methods.weit_state import WeitState
from fedmask_flwr.train import STEPS
from fedmask_flwr.wire import Frame

pytestmark = pytest.mark.flower


def test_every_task_is_evaluated_and_the_figures_agree(whole):
    lines, _, trained, judged = whole
    assert [line["clients_failed"] + line["evaluations_failed"] for line in lines] == [0] * 6
    assert [line["task"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [line["kb_entries"] for line in lines] == [0, 0, 3, 3, 3, 6]
    assert [len(line["attention"]) for line in lines] == [0] * 5 + [3]
    assert all(meta(reply)["task"] == (round_ > 3) for (round_, _), reply in trained.items())
    for (round_, _), reply in judged.items():
        own = told(reply)
        tasks = 1 + (round_ > 3)
        each = [own[f"loss_task_{j}"] for j in range(tasks)]
        assert f"loss_task_{tasks}" not in own
        assert own["loss"] == pytest.approx(sum(each) / tasks)
        assert (own["loss_base"], own["loss_new"]) == (each[0], each[-1])
        assert own["loss_mixture"] <= own["loss"] + math.log(tasks) + 1e-9
        assert own["task_found"] <= 1
        if tasks == 1:
            assert own["loss"] == own["loss_latest"] == own["loss_mixture"] == own["loss_latest_base"]
        else:
            assert own["loss_latest"] == pytest.approx((own["loss_latest_base"] + own["loss_new"]) / 2)
            assert own["loss_latest_base"] > own["loss_base"]
    last = [told(judged[6, k]) for k in range(3)]
    assert lines[-1]["client_loss"] == pytest.approx(sum(own["loss"] for own in last) / 3)
    assert lines[2]["client_loss"] < lines[0]["client_loss"] - 0.3
    assert lines[-1]["client_task_found"] > 0.8
    assert lines[-1]["client_loss_mixture"] < lines[-1]["client_loss_latest"]
    before = [told(judged[3, k])["loss_base"] for k in range(3)]
    assert [own["loss_base"] for own in last] == pytest.approx(before, abs=1e-3), "nothing is forgotten"
    assert "client_accuracy" not in lines[-1]


@pytest.mark.parametrize(
    ("tasks", "marks", "own"),
    [
        ((0, 1, 2), {0: 0, 1: 1, 2: 2}, (0, 1, 2)),
        ((1, 2), {1: 1, 2: 2}, (0, 0, 1)),  # it joined late
        ((0, 1), {0: 0, 1: 1}, (0, 1, 1)),  # it was not asked in the last one
        ((0, 1, 2), {0: 1, 1: 2}, (1, 2, 2)),  # it found a task too many in the first
        ((0, 1), {0: 0, 1: 0, 2: 1}, (0, 0, 1)),  # it missed one
        ((), {}, (0, 0, 0)),
    ],
)
def test_figures_are_those_of_the_definition(tasks, marks, own):
    """A device at task 2 with networks of ``tasks``: which one judges each task, and the mixture by its sum."""
    rng, count = np.random.default_rng(0), max(len(tasks), 1)
    nll = rng.gamma(2.0, 1.5, (count, 3, 7))  # of a network, on a task, of an example
    loaded = []
    turn = SimpleNamespace(tasks=tasks, marks=marks, load=lambda task: loaded.append(task))  # noqa: PLW0108
    device = SimpleNamespace(task=2, losses=lambda split, j: (torch.from_numpy(nll[len(loaded) - 1, j]), None))
    found = met(device, turn)
    assert loaded == list(tasks or (None,))
    aware = [nll[own[j], j].mean() for j in range(3)]
    assert [found[f"loss_task_{j}"] for j in range(3)] == pytest.approx(aware)
    mixed = [-math.log(sum(math.exp(-n) for n in nll[:, j, i]) / count) for j in range(3) for i in range(7)]
    assert found["loss_mixture"] == pytest.approx(sum(mixed) / 21)
    assert found["loss_latest"] == pytest.approx(nll[-1].mean())
    hits = [nll[:, j, i].argmin() == own[j] for j in range(3) for i in range(7)]
    assert found["task_found"] == pytest.approx(sum(hits) / 21)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "standalone"])
def test_methods_with_one_network_report_the_same_figures(method, whole, tmp_path):
    lines, _ = go(tmp_path / "run", method=method)
    keys = [{k for k in run[-1] if k.startswith("client_")} for run in (lines, whole[0])]
    assert keys[1] - keys[0] == {"client_capacity"}
    assert keys[0] <= keys[1]
    for line in lines:
        assert line["client_loss"] == line["client_loss_latest"] == line["client_loss_mixture"]
        assert line["clients_failed"] + line["evaluations_failed"] == 0
    assert lines[-1]["client_loss_base"] > whole[0][-1]["client_loss_base"], "it forgets"


def test_a_classifier_reports_accuracies_and_no_mixture(tmp_path):
    kw = {"model": "tiny:net", "weights": "seed", "num_server_rounds": 4}
    keys = []
    for method in ("fedweit", "fedavg"):
        lines, _ = go(tmp_path / method, ("0,1 1,2", "1,2 0,2"), data="tiny:blobs", method=method, **kw)
        line = lines[-1]
        both = [line["client_accuracy_task_0"], line["client_accuracy_task_1"]]
        assert line["client_accuracy"] == pytest.approx(sum(both) / 2)
        assert [line["client_accuracy_base"], line["client_accuracy_new"]] == pytest.approx(both)
        assert "client_loss_mixture" not in line and "client_task_found" not in line
        keys.append({k for k in line if k.startswith("client_")} - {"client_capacity"})
        if method == "fedweit":
            assert min(both) > 0.8
    assert keys[0] == keys[1]


def test_a_cumulative_stream_keeps_earlier_examples(tmp_path):
    rows = {}
    for stream in ("sequential", "cumulative"):
        replies = {}
        kw = {"method": "fedavg", "num_server_rounds": 2, "stream": stream}
        go(tmp_path / stream, tamper=heard("train", replies), **kw)
        rows[stream] = [[told(replies[r, k])["num-examples"] for k in range(3)] for r in (1, 2)]
    assert rows["cumulative"][0] == rows["sequential"][0]
    first, second = map(np.array, rows["sequential"])
    assert rows["cumulative"][1] == (first + second).tolist()


# Who is there when


def test_unsampled_devices_get_knowledge_later(tmp_path):
    """Two of three train in a round: whoever does has all that others ever gave, and gives what it owes."""
    replies = {}
    kw = {"fraction_train": 0.67, "num_server_rounds": 12}
    lines, _ = go(tmp_path / "run", tamper=heard("train", replies), **kw)
    assert [line["clients_failed"] + line["evaluations_failed"] for line in lines] == [0] * 12
    assert [line["clients_ok"] for line in lines] == [2] * 12
    gave = [(r, k) for (r, k), reply in replies.items() if meta(reply)["finished"] >= 0]
    assert len(gave) == lines[-1]["kb_entries"]
    assert any(r > 6 and meta(replies[r, k])["finished"] == 0 for r, k in gave), (
        "one was not asked in its last round"
    )
    for (r, k), reply in replies.items():
        sizes = {field.name: field.numel for field in Frame.parse(frame_of(reply)).fields}
        assert sizes["ids"] == sizes["holds"] == sum(past < r and client != k for past, client in gave)


def test_a_private_device_learns_and_gives_no_entry(tmp_path, monkeypatch):
    class Private(LoopbackGrid):
        def __init__(self, *args):
            super().__init__(*args)
            list(self.contexts.values())[1].node_config["private"] = True

    monkeypatch.setattr("rounds.LoopbackGrid", Private)
    replies = {}
    lines, _ = go(tmp_path / "run", tamper=heard("train", replies), num_server_rounds=4)
    assert [line["clients_ok"] for line in lines] == [3] * 4
    assert lines[-1]["kb_entries"] == 4
    assert {meta(reply)["finished"] for (_, k), reply in replies.items() if k == 1} == {-1}
    state = load_state(tmp_path / "run/checkpoint.safetensors", WeitState)[0]
    assert {client for _, client, _ in state.knowledge.owners.tolist()} == {0, 2}


def test_order_of_replies_does_not_matter(whole, tmp_path, monkeypatch):
    class Shuffled(LoopbackGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(messages, timeout=timeout)[::-1]

    monkeypatch.setattr("rounds.LoopbackGrid", Shuffled)
    lines, _ = go(tmp_path / "run", retrieve=1)
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (whole[1] / name).read_bytes()
    assert lines[-1]["attention"] == whole[0][-1]["attention"]


# Tasks that are found


def test_devices_find_their_tasks_each_in_its_time(tmp_path):
    replies = {}
    kw = {"num_server_rounds": 10, "task_identity": "found", "local_epochs": 2}
    lines, _ = go(tmp_path / "run", tamper=heard("train", replies), table={"lag": 2}, **kw)
    assert [line["clients_failed"] + line["evaluations_failed"] for line in lines] == [0] * 10
    switched = {k: min(r for (r, c), reply in replies.items() if c == k and meta(reply)["task"]) for k in range(3)}
    assert switched == {0: 6, 1: 8, 2: 10}, "the round in which the data changed"
    assert all(meta(reply)["task"] == (r >= switched[k]) for (r, k), reply in replies.items())
    assert [line["kb_entries"] for line in lines] == [0] * 5 + [1, 1, 2, 2, 3]
    state = load_state(tmp_path / "run/checkpoint.safetensors", WeitState)[0]
    assert state.knowledge.owners[:, 1:].tolist() == [[0, 0], [1, 0], [2, 0]]
    for client in range(3):
        memories = sorted((tmp_path / "run/memory").rglob(f"{client}.*.safetensors"))
        tasks = [int(load_file(path)["task"][0]) for path in memories]
        assert tasks == [int(r >= switched[client]) for r in (9, 10)]
    assert lines[-1]["task"] == -1


def test_tasks_at_different_times_cannot_be_told(tmp_path):
    with pytest.raises(ConfigError, match=r"lag 2\), so the server cannot tell them: set task-identity to found"):
        go(tmp_path / "run", table={"lag": 2})


def test_each_network_is_judged_on_its_own_task(tmp_path):
    """Device 1 loses the memory of its first task: it has networks of the second and the third."""
    judged = {}

    def tamper(reply, message, context):
        first = message.metadata.message_type == "train" and number(message) == 2
        if first and context.node_config["partition-id"] == 1:
            for path in (tmp_path / "run/memory").rglob("1.*"):
                path.unlink()
        return heard("evaluate", judged)(reply, message, context)

    go(tmp_path / "run", ("0 1 2", "1 3 0"), tamper, local_epochs=3)
    memory = load_file(max((tmp_path / "run/memory").rglob("1.*.safetensors")))
    assert sorted(name for name in memory if name.startswith("A.")) == ["A.1", "A.2"]
    second = [told(judged[r, 1])["loss_task_1"] for r in (4, 5, 6)]
    assert second == pytest.approx([second[0]] * 3, abs=1e-3)
    assert all(told(judged[6, 1])[f"loss_task_{j}"] < 4.5 for j in (1, 2))


def test_a_device_s_network_of_a_task_can_be_exported(whole):
    _, folder, _, _ = whole
    first, latest = (read_run(folder, client=1, task=task).model for task in (0, None))
    x = torch.from_numpy(tiny.sources("test", "")[0])
    assert torch.isfinite(first(x)).all()
    assert (first(x) != latest(x)).any()
    with pytest.raises(ExportError, match="no network for task 7, only for 0, 1"):
        read_run(folder, client=1, task=7)
    with pytest.raises(ExportError, match="add --client"):
        read_run(folder, task=0)


def test_a_turn_that_diverged_is_not_remembered(tmp_path):
    """Its reply cannot be sent; the device goes on from what it knew before."""
    lines, _ = go(
        tmp_path / "run", learning_rate=1e30, num_server_rounds=2, fraction_evaluate=0.0, max_silent_rounds=0
    )
    assert [line["clients_failed"] for line in lines] == [3, 3]
    assert not list((tmp_path / "run/memory").rglob("*.safetensors"))


def test_codecs_that_flip_bits_are_refused():
    with pytest.raises(ValueError, match="fedweit needs an exact codec"):
        MaskStrategy("fedweit", tiny.net(), codec="fuse8")


def test_a_reply_s_metrics_are_bounded():
    many = {f"m{i:04d}": 1.0 for i in range(1000)} | {"long" * 40: 1.0}
    reply = SimpleNamespace(content=RecordDict({"metrics": MetricRecord(many)}))
    heard = finite(reply)
    assert len(heard) == MOST
    assert "m0000" in heard


@pytest.mark.parametrize("masks", [2, 3, 8, 32])
def test_every_mask_of_a_cycle_is_trained(masks):
    steps = {(turn * STEPS + step) % masks for turn in range(1, 51) for step in range(3)}
    assert len(steps) == masks


def test_nothing_is_fine_tuned_in_a_scenario(tmp_path):
    with pytest.raises(ConfigError, match="leave adapt-epochs at -1"):
        go(tmp_path / "run", method="fedavg", adapt_epochs=2)
