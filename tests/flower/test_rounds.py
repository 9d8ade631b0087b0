"""Rounds of the real apps through Flower's own types, in one process."""

from __future__ import annotations

import json

import numpy as np
import oracles_methods as oracles
import pytest
import tiny
import torch
from flwr.app import Context, RecordDict
from loopback import LoopbackGrid
from rounds import every_case, frame_of, run, without_clock

from client_app.main import app
from fedmask_flwr.flower import roster
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.flower.records import STYPE
from fedmask_flwr.methods import resolve
from fedmask_flwr.train import evaluate
from fedmask_flwr.wire import Frame, unpack

pytestmark = pytest.mark.flower


@every_case
def test_two_clients_learn(case, tmp_path):
    kw = {"method": case.method, "model": f"tiny:{case.net}", **case.settings}
    lines, _ = run(tmp_path / "run", 2, num_server_rounds=12, learning_rate=case.lr, **kw)
    assert [line["round"] for line in lines] == list(range(1, 13))
    here = "accuracy_threshold" if resolve(case.method).modes else "client_accuracy_mean"
    assert lines[-1][here] > case.accuracy
    assert {"config.json", "metrics.jsonl", "checkpoint.safetensors", "mask.fedmask", "curve.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@every_case
def test_a_killed_run_resumes_bit_for_bit(case, tmp_path):
    """2 rounds, a kill, 3 rounds by a new server and new node ids: the same files as 5 rounds in one go."""
    kw = {"method": case.method, "model": f"tiny:{case.net}", **case.settings}
    whole, _ = run(tmp_path / "whole", **kw)
    run(tmp_path / "cut", stop_after=2, **kw)
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 2
    lines, grid = run(tmp_path / "cut", first_node=5000, **kw)
    assert "query" not in {m.metadata.message_type for m in grid.messages} or case.personal
    assert sum(m.metadata.message_type == "train" for m in grid.messages) == 3 * 3
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [without_clock(a) for a in lines] == [without_clock(a) for a in whole]


@every_case
def test_partial_participation_resumes_bit_for_bit(case, tmp_path):
    """The sampled clients depend on the seed and the round, not on node ids."""
    kw = {"method": case.method, "model": f"tiny:{case.net}", "fraction_train": 0.4, "clients": 5, **case.settings}
    run(tmp_path / "whole", **kw)
    run(tmp_path / "cut", stop_after=3, **kw)
    run(tmp_path / "cut", first_node=9000, **kw)
    same = [(tmp_path / d / "mask.fedmask").read_bytes() for d in ("whole", "cut")]
    assert same[0] == same[1]


@every_case
def test_reported_bytes_are_the_frames_bytes(case, tmp_path):
    seen = []

    def tamper(reply, message, context):
        if message.metadata.message_type == "train":
            seen.append((frame_of(message), frame_of(reply)))
        return reply

    kw = {"method": case.method, "model": f"tiny:{case.net}", **case.settings}
    lines, grid = run(tmp_path / "run", 3, tamper, num_server_rounds=2, **kw)
    for number, line in enumerate(lines):
        pairs = seen[3 * number : 3 * number + 3]
        down, up = (sum(len(p[i]) for p in pairs) for i in (0, 1))
        assert (line["downlink_bytes"], line["uplink_bytes"]) == (down, up)
        d = grid.messages[-1].content.array_records["arrays"]["frame"].shape[0]
        assert line["uplink_bpp"] == pytest.approx(8 * up / 3 / d)
        assert line["downlink_bpp"] == pytest.approx(8 * down / 3 / d)
        assert line["flower_uplink_bytes"] > 0
    if case.oracle is oracles.beta:
        assert lines[0]["downlink_bpp"] < lines[1]["downlink_bpp"] < np.log2(4) + 8 * 150 / d


def test_one_frame_a_message(tmp_path):
    _, grid = run(tmp_path / "run", 2, num_server_rounds=1)
    for message in grid.messages:
        (array,) = message.content.array_records["arrays"].values()
        assert array.stype == STYPE


def test_order_of_replies_does_not_matter(tmp_path):
    run(tmp_path / "a", method="fedavg")

    class Shuffled(LoopbackGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(messages, timeout=timeout)[::-1]

    config = tiny.run_config(out=str(tmp_path / "b"), method="fedavg")
    serve(Shuffled(app, 3, config), Context(1, 1, {}, RecordDict(), config))
    assert (tmp_path / "a/mask.fedmask").read_bytes() == (tmp_path / "b/mask.fedmask").read_bytes()


def test_clients_evaluate_when_asked(tmp_path):
    lines, grid = run(tmp_path / "run", 3, fraction_evaluate=1.0, num_server_rounds=2)
    assert {m.metadata.message_type for m in grid.messages} == {"train", "evaluate"}
    assert 0.0 <= lines[-1]["client_accuracy"] <= 1.0
    evaluated = sum(len(frame_of(m)) for m in grid.messages if m.content["config"]["server-round"] == 2)
    assert lines[-1]["downlink_bytes"] + lines[-1]["evaluate_bytes"] == evaluated


def test_final_mask_is_one_readable_frame(tmp_path):
    run(tmp_path / "run", 2, num_server_rounds=2)
    data = (tmp_path / "run/mask.fedmask").read_bytes()
    frame = Frame.parse(data)
    d = frame.fields[0].numel
    bits = unpack(data, digest=None, round_=None, known=None, expect={"mask": d}).payload.bits
    assert 0.1 < np.unpackbits(bits["mask"]).mean() < 0.9


def test_delta_mask_with_everything_sent_is_fedpm_at_a_fraction(tmp_path):
    """Same uniforms, exact codec, kappa 1: equal masks after every round, under a third of the bytes."""
    kw = {"clients": 4, "data": "digits", "model": "mlp", "num_server_rounds": 8, "local_epochs": 2}
    pm, _ = run(tmp_path / "pm", method="fedpm", **kw)
    delta, _ = run(tmp_path / "delta", method="deltamask", kappa=1.0, kappa_min=1.0, **kw)
    for a, b in zip(pm, delta, strict=True):
        for mode in ("sampled", "threshold", "expected"):
            assert a[f"accuracy_{mode}"] == b[f"accuracy_{mode}"]
        assert a["uplink_bpp"] <= 1.01
    masks = [(tmp_path / d / "mask.fedmask").read_bytes() for d in ("pm", "delta")]
    assert masks[0] == masks[1]
    assert sum(b["uplink_bytes"] for b in delta) < sum(a["uplink_bytes"] for a in pm) / 3


def test_a_personal_method_tells_each_client_its_own(tmp_path):
    lines, grid = run(tmp_path / "run", 3, method="personal:Personal", num_server_rounds=3)
    assert [line["clients_ok"] for line in lines] == [3, 3, 3]
    kinds = [m.metadata.message_type for m in grid.messages]
    assert kinds == ["query"] * 3 + ["train"] * 9
    told = [bytes(frame_of(m)) for m in grid.messages[-3:]]
    assert len(set(told)) == 3
    run(tmp_path / "cut", 3, method="personal:Personal", num_server_rounds=3, stop_after=2)
    run(tmp_path / "cut", 3, method="personal:Personal", num_server_rounds=3, first_node=7000)
    assert (tmp_path / "cut/mask.fedmask").read_bytes() == (tmp_path / "run/mask.fedmask").read_bytes()


def test_dropout_repeats_whatever_torch_s_generator_does(tmp_path):
    for name in "ab":
        torch.manual_seed(ord(name))
        before = torch.random.get_rng_state()
        run(tmp_path / name, 2, model="tiny:dropout_net", num_server_rounds=2)
        assert torch.equal(before, torch.random.get_rng_state())
    assert (tmp_path / "a/mask.fedmask").read_bytes() == (tmp_path / "b/mask.fedmask").read_bytes()


def test_batch_norm_never_sees_a_batch_of_one(tmp_path):
    lines, _ = run(tmp_path / "run", 3, model="tiny:norm_net", num_server_rounds=1, batch_size=7)  # 50 = 7 * 7 + 1
    assert lines[0]["clients_failed"] == 0
    x, y = torch.randn(1001, 8), torch.zeros(1001, dtype=torch.int64)
    evaluate(tiny.norm_net(), x, y)


def test_expected_clients_are_waited_for(tmp_path):
    class Growing(LoopbackGrid):
        looks = 0

        def get_node_ids(self):
            self.looks += 1
            return super().get_node_ids()[: 1 + self.looks]

    config = tiny.run_config(out=str(tmp_path / "run"), clients=4, num_server_rounds=1)
    roster.POLL = 0.01
    serve(Growing(app, 4, config), Context(1, 1, {}, RecordDict(), config))
    line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert line["clients_ok"] == 4
