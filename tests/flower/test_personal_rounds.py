"""Whole runs of methods whose devices remember: what is told to whom, and what happens to the memories."""

from __future__ import annotations

import shutil

import pytest
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid
from rounds import frame_of, run, without_clock
from safetensors.numpy import load_file

from fedmask_flwr import checkpoint, memory
from fedmask_flwr.flower.client import client_number, memory_folder
from fedmask_flwr.wire import Frame

pytestmark = pytest.mark.flower
WAYS = {
    "mean": {"method": "fedmask"},
    "bit": {"method": "fedmask", "returns": "bit", "prune_by": "neuron"},
    "part": {"method": "fedmask", "fraction_train": 0.4, "clients": 5, "adapt_epochs": 1},
    "standalone": {"method": "standalone"},
    "standalone-part": {"method": "standalone", "fraction_train": 0.4, "clients": 5},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def memories(out):
    """Bytes of each array that the devices remember, by client, round and name; the header names the run."""
    files = [path for path in (out / "memory").rglob("*") if path.is_file()]
    return {f"{path.name}/{k}": v.tobytes() for path in files for k, v in load_file(path).items()}


def newest(out, client):
    """The youngest memory of a device."""
    return max((out / "memory").rglob(f"{client}.*.safetensors"))


def of_round(grid, number, kind="train"):
    """Messages of a round, by client."""
    return {
        grid.contexts[m.metadata.dst_node_id].node_config["partition-id"]: m
        for m in grid.messages
        if m.metadata.message_type == kind and m.content["config"]["server-round"] == number
    }


def fields_of(message):
    return {field.name for field in Frame.parse(frame_of(message)).fields}


@every_way
@pytest.mark.parametrize("deaf", [False, True], ids=["before", "after"])
def test_a_killed_server_resumes_bit_for_bit(way, deaf, tmp_path):
    """Also when the devices had trained the round already: what they learned in it must not leak into it."""
    whole, _ = run(tmp_path / "whole", **way)
    run(tmp_path / "cut", stop_after=2, deaf=deaf, **way)
    written = memories(tmp_path / "cut")
    assert any(".000003." in name for name in written) == deaf
    lines, _ = run(tmp_path / "cut", first_node=5000, **way)
    assert [without_clock(a) for a in lines] == [without_clock(a) for a in whole]
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert memories(tmp_path / "cut") == memories(tmp_path / "whole")


@pytest.mark.parametrize("returns", ["mean", "bit"])
@pytest.mark.parametrize("prune", [0.0, 0.2])
def test_a_device_that_lost_its_memory_goes_on(returns, prune, tmp_path):
    """It is not failed, replies in the first form once, and is told its own vector again afterwards."""
    out, said = tmp_path / "run", {}

    def tamper(reply, message, context):
        if message.metadata.message_type == "train":
            said[context.node_config["partition-id"], message.content["config"]["server-round"]] = fields_of(reply)
            if message.content["config"]["server-round"] == 2 and context.node_config["partition-id"] == 2:
                for path in (out / "memory").rglob("1.*"):
                    path.unlink()
        return reply

    lines, grid = run(out, 3, tamper, method="fedmask", returns=returns, prune=prune)
    assert [line["clients_failed"] for line in lines] == [0] * 5
    assert [line["evaluations_failed"] for line in lines] == [0] * 5
    assert [said[1, r] for r in range(1, 6)] == [{"first"}, {"mask"}, {"first"}, {"mask"}, {"mask"}]
    assert [said[0, r] for r in range(1, 6)] == [{"first"}, *[{"mask"}] * 4]
    assert all(fields_of(message) == {returns} for message in of_round(grid, 5).values())


def test_a_lost_folder_is_a_new_beginning_for_all(tmp_path):
    run(tmp_path / "run", method="fedmask", stop_after=3)
    shutil.rmtree(tmp_path / "run/memory")
    lines, _ = run(tmp_path / "run", method="fedmask")
    assert [line["clients_ok"] for line in lines] == [3] * 5


def test_a_damaged_memory_fails_its_client_alone(tmp_path, caplog):
    """Both generations: the message names file and fix, others go on, the file stays as it is."""
    out = tmp_path / "run"
    run(out, method="fedmask", stop_after=3)
    broken = sorted((out / "memory").rglob("1.*.safetensors"))
    assert len(broken) == 2
    for path in broken:
        path.write_bytes(path.read_bytes()[:-5])
    before = {path: path.read_bytes() for path in broken}
    lines, _ = run(out, method="fedmask")
    assert [line["clients_failed"] for line in lines] == [0, 0, 0, 1, 1]
    assert [line["evaluations_failed"] for line in lines] == [0, 0, 0, 1, 1]
    assert {path: path.read_bytes() for path in broken} == before
    for path in broken:
        assert f"{path} is not the memory of client 1" in caplog.text
    assert "restore it from a backup, or delete it" in caplog.text
    said = [record.getMessage() for record in caplog.records if "failed (code" in record.getMessage()]
    assert any("DeviceMemoryError" in line and str(broken[1]) in line for line in said), "the server says it too"


def test_the_older_generation_stands_in(tmp_path, caplog):
    out = tmp_path / "run"
    run(out, method="fedmask", stop_after=3)
    path = newest(out, 1)
    path.write_bytes(b"")
    lines, _ = run(out, method="fedmask")
    assert [line["clients_failed"] for line in lines] == [0] * 5
    assert f"{path} is not the memory of client 1" in caplog.text


def test_a_full_disk_fails_the_turn_and_costs_no_memory(tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(path, data, mode):
        if path.name == "1.000003.safetensors":
            raise OSError(28, "No space left on device")
        checkpoint.write_atomic(path, data, mode)

    monkeypatch.setattr(memory, "write_atomic", full)
    lines, _ = run(out, method="fedmask")
    assert [line["clients_failed"] for line in lines] == [0, 0, 1, 0, 0]
    assert {name.partition("/")[0] for name in memories(out) if name.startswith("1.")} == {
        "1.000004.safetensors",
        "1.000005.safetensors",
    }


def test_a_lost_first_reply_heals(tmp_path):
    said = []

    def tamper(reply, message, context):
        if message.metadata.message_type != "train" or context.node_config["partition-id"] != 1:
            return reply
        said.append(fields_of(reply))
        return None if message.content["config"]["server-round"] == 1 else reply

    lines, _ = run(tmp_path / "run", 3, tamper, method="fedmask", num_server_rounds=4)
    assert [line["clients_failed"] for line in lines] == [1, 0, 0, 0]
    assert said == [{"first"}, {"first"}, {"mask"}, {"mask"}]


def test_each_device_is_told_its_own_and_newcomers_nothing(tmp_path):
    _, grid = run(tmp_path / "run", method="fedmask", num_server_rounds=3)
    assert all(fields_of(message) == set() for message in of_round(grid, 1).values())
    for number in (2, 3):
        frames = {bytes(frame_of(message)) for message in of_round(grid, number).values()}
        assert len(frames) == 3


def test_partial_participation_keeps_what_the_others_have(tmp_path):
    """Who did not train in round 1 is a newcomer later; who did is told the row of its last turn."""
    lines, grid = run(tmp_path / "run", **WAYS["part"], num_server_rounds=6)
    assert [line["clients_failed"] for line in lines] == [0] * 6
    seen = set()
    for number in range(1, 7):
        for client, message in of_round(grid, number).items():
            assert fields_of(message) == ({"mean"} if client in seen else set())
            seen.add(client)
        told = of_round(grid, number, "evaluate")
        assert set(told) == set(range(5)), "all evaluate, whoever trained"
        assert {client for client, message in told.items() if fields_of(message)} == seen
    assert len(seen) > 2


class SameNumber(LoopbackGrid):
    """The third node says it is the first."""

    def __init__(self, *args):
        super().__init__(*args)
        node = list(self.contexts)[2]
        self.contexts[node].node_config["client-id"] = 0


@pytest.mark.parametrize("method", ["fedmask", "standalone"])
def test_two_nodes_with_one_number_are_both_dropped(method, tmp_path, monkeypatch):
    monkeypatch.setattr("rounds.LoopbackGrid", SameNumber)
    lines, _ = run(tmp_path / "run", 4, method=method, num_server_rounds=3)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(2, 2)] * 3


def test_what_devices_measure_is_reported(tmp_path):
    shares = []

    def tamper(reply, message, context):
        if message.metadata.message_type == "evaluate":
            shares.append(reply.content.metric_records["metrics"]["accuracy"])
        return reply

    lines, grid = run(tmp_path / "run", 4, tamper, method="fedmask", num_server_rounds=3)
    d = 352
    for number, line in enumerate(lines, 1):
        values = shares[4 * number - 4 : 4 * number]
        mean = sum(values) / 4
        assert line["client_accuracy_mean"] == pytest.approx(mean)
        assert line["client_accuracy_std"] == pytest.approx((sum((v - mean) ** 2 for v in values) / 4) ** 0.5)
        assert line["client_accuracy_worst"] == line["client_accuracy_worst_decile"] == min(values)
        assert line["client_model_bits"] == d
        assert line["client_kept"] == pytest.approx(0.8, abs=0.01)
        assert 0.1 < line["client_active"] < line["client_kept"]
        assert "accuracy_threshold" not in line
        sizes = [
            sum(len(frame_of(m)) for m in of_round(grid, number, kind).values()) for kind in ("train", "evaluate")
        ]
        assert [line["downlink_bytes"], line["evaluate_bytes"]] == sizes
        assert line["downlink_bpp"] == pytest.approx(8 * sizes[0] / 4 / d)
    assert lines[0]["evaluate_bytes"] > lines[0]["downlink_bytes"], "newcomers are told nothing, then evaluate"


def test_fine_tuning_does_not_touch_the_memory(tmp_path):
    tuned, _ = run(tmp_path / "tuned", method="fedmask", adapt_epochs=3, tune_lr=0.01)
    plain, _ = run(tmp_path / "plain", method="fedmask", adapt_epochs=0)
    assert memories(tmp_path / "tuned").keys() == memories(tmp_path / "plain").keys()
    assert [line["uplink_bytes"] for line in tuned] == [line["uplink_bytes"] for line in plain]
    assert tuned[-1]["client_accuracy_mean"] != plain[-1]["client_accuracy_mean"]


@pytest.mark.parametrize("name", ["mean", "part"])
def test_a_new_run_in_old_memories_begins_anew(name, tmp_path):
    """A run has a memory of its own, even where another one had the same settings.

    Devices that are not sampled in round 1 are evaluated all the same, and must not remember the run before.
    """
    kw = {**WAYS[name], "memory_dir": str(tmp_path / "shared")}
    first, _ = run(tmp_path / "a", **kw)
    run(tmp_path / "b", seed=8, **kw)
    run(tmp_path / "c", prune=0.3, **kw)
    again, _ = run(tmp_path / "d", **kw)
    assert [without_clock(a) for a in first] == [without_clock(a) for a in again]
    assert len(list((tmp_path / "shared").iterdir())) == 4


def context(run_config=None, **node_config):
    return Context(1, 77, node_config, RecordDict(), run_config or {})


def test_a_device_says_where_its_memory_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert memory_folder(context()) == tmp_path / "state/fedmask-flwr"
    assert memory_folder(context({"memory-dir": str(tmp_path / "run")})) == tmp_path / "run"
    both = context({"memory-dir": str(tmp_path / "run")}, **{"memory-dir": str(tmp_path / "mine")})
    assert memory_folder(both) == tmp_path / "mine"


@pytest.mark.parametrize("number", ["../../evil", "1/2", "", "0x10"])
def test_a_client_number_is_a_number(number):
    with pytest.raises(ValueError, match="invalid literal"):
        client_number(context(**{"client-id": number}))


def test_an_app_without_a_query_handler_is_told_how_to_get_one(tmp_path):
    def mute(reply, message, context):
        return None if message.metadata.message_type == "query" else reply

    with pytest.raises(RuntimeError, match=r"flower\.identify as the ClientApp's query handler"):
        run(tmp_path / "run", 3, mute, method="fedmask")
