"""Whole runs whose devices follow the counts: the result is that of a run which tells everything, bit for bit."""

from __future__ import annotations

import pytest
from rounds import frame_of, run, without_clock

from fedmask_flwr.wire import Frame

pytestmark = pytest.mark.flower
TASK = {"clients": 4, "model": "following_fleet:wide", "num_server_rounds": 6, "reset": 4}
WAYS = {
    "fedpm-votes": {"method": "fedpm", "downlink": "votes"},
    "deltamask-votes": {"method": "deltamask", "downlink": "votes"},
    "deltamask-relay": {"method": "deltamask", "downlink": "relay"},
    "klms-relay": {"method": "klms", "target_bpp": 0.1, "downlink": "relay"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
once = pytest.mark.each_method  # on the other flwr releases one of these tests stands for all
both_ways = pytest.mark.parametrize("way", [WAYS["fedpm-votes"], WAYS["klms-relay"]], ids=["votes", "relay"])
RELAY = WAYS["deltamask-relay"]
FILES = ("mask.fedmask", "checkpoint.safetensors")


def whole(way):
    return {**TASK, **way, "downlink": "whole"}


def result(out):
    """The final mask; that frame's header names the model and the round only."""
    return (out / "mask.fedmask").read_bytes()


def told(grid, client, kind="train"):
    """Names of the fields that a client was sent, round by round."""
    return [
        ",".join(field.name for field in Frame.parse(frame_of(m)).fields)
        for m in grid.messages
        if m.metadata.message_type == kind
        and grid.contexts[m.metadata.dst_node_id].node_config["partition-id"] == client
    ]


def wanted(way, rounds=6):
    return ["", *[way["downlink"]] * (rounds - 1)]


@once
@every_way
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_following_changes_the_bytes_and_nothing_else(way, share, tmp_path):
    plain, _ = run(tmp_path / "whole", **whole(way), fraction_train=share)
    lines, grid = run(tmp_path / "less", **TASK, **way, fraction_train=share)
    assert result(tmp_path / "less") == result(tmp_path / "whole")
    assert [line["clients_failed"] for line in lines] == [0] * 6
    for a, b in zip(lines, plain, strict=True):
        assert a["accuracy_threshold"] == b["accuracy_threshold"]
        assert a["uplink_bytes"] == b["uplink_bytes"]
    less, more = (sum(line["downlink_bytes"] for line in found) for found in (lines, plain))
    assert less < (0.9 if share == 1.0 else 1.0) * more
    assert any(way["downlink"] in told(grid, client) for client in range(4))
    if share == 1.0 and way["downlink"] == "relay":
        assert less < more / 2
        assert all(told(grid, client) == wanted(way) for client in range(4))


@both_ways
def test_a_failed_node_is_told_everything_next(way, tmp_path):
    """Its reply of round 3 does not arrive, in both runs."""

    def tamper(reply, message, context):
        lost = message.metadata.message_type == "train" and context.node_config["partition-id"] == 1
        return None if lost and message.content["config"]["server-round"] == 3 else reply

    run(tmp_path / "whole", tamper=tamper, **whole(way))
    lines, grid = run(tmp_path / "less", tamper=tamper, **TASK, **way)
    assert result(tmp_path / "less") == result(tmp_path / "whole")
    assert [line["clients_failed"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert told(grid, 1)[3] == "ones"
    assert told(grid, 0)[4] == told(grid, 1)[4] != "ones"


@once
@both_ways
def test_a_lost_memory_costs_one_round_of_its_device(way, tmp_path, caplog):
    """The same as a run in which that reply of that device did not arrive."""
    out = tmp_path / "less"

    def mine(message, context, number):
        trained = message.metadata.message_type == "train" and context.node_config["partition-id"] == 1
        return trained and message.content["config"]["server-round"] == number

    def forget(reply, message, context):
        if mine(message, context, 3):
            for path in (out / "memory").rglob("1.*"):
                path.unlink()
        return reply

    def drop(reply, message, context):
        return None if mine(message, context, 4) else reply

    lines, grid = run(out, tamper=forget, **TASK, **way)
    run(tmp_path / "whole", tamper=drop, **whole(way))
    assert result(out) == result(tmp_path / "whole")
    assert [line["clients_failed"] for line in lines] == [0, 0, 0, 1, 0, 0]
    assert "does not hold the counts of round 3 any more" in caplog.text
    assert told(grid, 1)[3:] == [way["downlink"], "ones", told(grid, 0)[5]]


@once
@both_ways
@pytest.mark.parametrize("deaf", [False, True], ids=["before", "after"])
def test_a_killed_server_goes_on_being_followed(way, deaf, tmp_path):
    """Also when the devices had trained the next round, and remember it."""
    kw = {**TASK, **way, "fraction_train": 0.75}
    lines, grid = run(tmp_path / "undisturbed", **kw)
    run(tmp_path / "cut", stop_after=3, deaf=deaf, **kw)
    again, after = run(tmp_path / "cut", first_node=5000, **kw)
    assert [without_clock(a) for a in again] == [without_clock(a) for a in lines]
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    for client in range(4):
        assert told(after, client) == told(grid, client)[-len(told(after, client)) :]
    assert any(way["downlink"] in told(after, client) for client in range(4))


@once
@pytest.mark.parametrize("way", [RELAY, WAYS["fedpm-votes"]], ids=["relay", "votes"])
def test_devices_evaluate_what_they_followed(way, tmp_path):
    """The same accuracies as where everything is told, for fewer bytes."""
    kw = {"fraction_train": 0.5, "fraction_evaluate": 1.0}
    plain, _ = run(tmp_path / "whole", **whole(way), **kw)
    lines, grid = run(tmp_path / "less", **TASK, **way, **kw)
    for a, b in zip(lines, plain, strict=True):
        assert a["evaluations_failed"] == a["clients_failed"] == 0
        for name in ("client_accuracy", "client_accuracy_mean", "client_kept"):
            assert a[name] == b[name]
    assert sum(line["evaluate_bytes"] for line in lines) < sum(line["evaluate_bytes"] for line in plain)
    assert any(way["downlink"] in told(grid, client, "evaluate") for client in range(4))


@once
def test_a_private_device_takes_no_part_in_a_relay(tmp_path, caplog, monkeypatch):
    """Its run goes on without it, and says why."""
    from loopback import LoopbackGrid

    class Private(LoopbackGrid):
        def __init__(self, *args):
            super().__init__(*args)
            self.contexts[102].node_config["private"] = True

    monkeypatch.setattr("rounds.LoopbackGrid", Private)
    lines, _ = run(tmp_path / "relay", **{**TASK, "num_server_rounds": 2}, **RELAY)
    assert [line["clients_failed"] for line in lines] == [1, 1]
    assert "hands its replies on" in caplog.text
    lines, _ = run(tmp_path / "votes", **{**TASK, "num_server_rounds": 2}, **WAYS["deltamask-votes"])
    assert [line["clients_failed"] for line in lines] == [0, 0]
