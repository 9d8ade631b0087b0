"""A round is saved before the next is asked for and evaluated while that one is trained; a kill loses nothing."""

from __future__ import annotations

import json

import pytest
import tiny
from flwr.app import Context, RecordDict
from flwr.superlink.grid import HttpGrid
from loopback import LoopbackGrid
from rounds import Killed, run, without_clock

from client_app.main import app
from fedmask_flwr.flower import apps
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.track import RunDir

pytestmark = pytest.mark.flower
METHODS = pytest.mark.parametrize("method", ["deltamask", "fedmask", "fedavg"])


class Network(HttpGrid):
    """Devices that are elsewhere: they answer once all messages are sent, when they are asked for replies."""

    def __init__(self, loop, told):
        self.loop, self.told, self.sent = loop, told, {}

    def get_node_ids(self):
        return self.loop.get_node_ids()

    def push_messages(self, messages):
        self.sent = {message.object_id: message for message in messages}
        self.told.append(f"sent {kind(next(iter(self.sent.values())))}")
        return list(self.sent)

    def pull_messages(self, message_ids):
        self.told.append("looked")
        return self.loop.send_and_receive([self.sent[i] for i in message_ids])


def kind(message):
    return message.metadata.message_type


@pytest.fixture
def told(monkeypatch):
    """What the server did, in order."""
    found = []
    evaluate, save, record = apps.evaluate_modes, RunDir.save, RunDir.record

    def evaluated(*args):
        found.append("evaluated")
        return evaluate(*args)

    def saved(self, state, meta):
        found.append(f"saved {meta['round']}")
        save(self, state, meta)

    def recorded(self, line):
        found.append(f"recorded {line['round']}")
        record(self, line)

    monkeypatch.setattr(apps, "evaluate_modes", evaluated)
    monkeypatch.setattr(RunDir, "save", saved)
    monkeypatch.setattr(RunDir, "record", recorded)
    return found


def over_a_network(out, told, **changes):
    config = tiny.run_config(**{"out": str(out), "memory_dir": str(out / "memory"), **changes})
    serve(Network(LoopbackGrid(app, 3, config), told), Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_round_is_evaluated_while_the_next_is_trained(tmp_path, told):
    over_a_network(tmp_path / "run", told, num_server_rounds=3)
    assert told == [
        "evaluated",  # before any training
        "sent train", "looked", "saved 1",
        "sent train", "evaluated", "recorded 1", "looked", "saved 2",
        "sent train", "evaluated", "recorded 2", "looked", "saved 3",
        "evaluated", "recorded 3",
    ]  # fmt: skip


@METHODS
def test_a_network_gives_the_same_run(method, tmp_path, told):
    here, _ = run(tmp_path / "here", method=method, fraction_evaluate=0.5)
    there = over_a_network(tmp_path / "there", told, method=method, fraction_evaluate=0.5)
    assert [without_clock(line) for line in there] == [without_clock(line) for line in here]
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@METHODS
def test_a_server_killed_while_it_evaluates_loses_nothing(method, tmp_path, told, monkeypatch):
    """Its round is saved and its line is not there: started again, it completes the line and trains the next."""
    whole, _ = run(tmp_path / "whole", method=method)
    told.clear()
    evaluate = apps.evaluate_modes

    def killed(*args):
        if told.count("evaluated") == 2:
            raise Killed
        return evaluate(*args)

    monkeypatch.setattr(apps, "evaluate_modes", killed)
    with pytest.raises(Killed):
        over_a_network(tmp_path / "cut", told, method=method)
    lines = (tmp_path / "cut/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1]
    assert told[-2:] == ["saved 2", "sent train"]
    monkeypatch.setattr(apps, "evaluate_modes", evaluate)
    lines, grid = run(tmp_path / "cut", first_node=5000, method=method)
    trained = [m.content["config"]["server-round"] for m in grid.messages if kind(m) == "train"]
    assert min(trained) == 3
    assert [without_clock(line) for line in lines] == [without_clock(line) for line in whole]
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
