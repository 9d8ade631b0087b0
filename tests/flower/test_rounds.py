"""Rounds of the real apps through Flower's own types, in one process."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import tiny
import torch
from cases import CASES
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from loopback import LoopbackGrid

from client_app.main import app
from fedmask_flwr import show, track
from fedmask_flwr.checkpoint import CheckpointError
from fedmask_flwr.checkpoint import write_atomic as atomic
from fedmask_flwr.config import ConfigError
from fedmask_flwr.flower import roster
from fedmask_flwr.flower.apps import serve
from fedmask_flwr.flower.records import STYPE
from fedmask_flwr.track import RunDirError
from fedmask_flwr.train import evaluate
from fedmask_flwr.wire import Frame, unpack

pytestmark = pytest.mark.flower
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(out, clients=3, tamper=None, first_node=100, stop_after=None, **changes):
    """Serve a run into ``out`` and return its metrics lines and the grid."""
    config = tiny.run_config(out=str(out), **changes)
    grid = LoopbackGrid(app, clients, config, tamper, first_node)
    if stop_after is not None:
        grid.send_and_receive = dying(grid.send_and_receive, stop_after)
    with contextlib.suppress(Killed):
        serve(grid, Context(1, 1, {}, RecordDict(), config))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], grid


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


def dying(send, rounds):
    left = [rounds]

    def send_and_receive(messages, *, timeout=None):
        if any(m.metadata.message_type == "train" for m in messages):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
        return send(messages, timeout=timeout)

    return send_and_receive


@every_case
def test_two_clients_learn(case, tmp_path):
    lines, _ = run(
        tmp_path / "run", 2, method=case.method, num_server_rounds=12, learning_rate=0.05, **case.settings
    )
    assert [line["round"] for line in lines] == list(range(1, 13))
    assert lines[-1]["accuracy_threshold"] > case.accuracy
    assert {"config.json", "metrics.jsonl", "checkpoint.safetensors", "mask.fedmask", "curve.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


@every_case
def test_a_killed_run_resumes_bit_for_bit(case, tmp_path):
    """2 rounds, a kill, 3 rounds by a new server and new node ids: the same files as 5 rounds in one go."""
    kw = {"method": case.method, **case.settings}
    whole, _ = run(tmp_path / "whole", **kw)
    run(tmp_path / "cut", stop_after=2, **kw)
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 2
    lines, grid = run(tmp_path / "cut", first_node=5000, **kw)
    assert {m.metadata.message_type for m in grid.messages} == {"train"}
    assert sum(m.metadata.message_type == "train" for m in grid.messages) == 3 * 3
    for name in ("mask.fedmask", "checkpoint.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [without_clock(a) for a in lines] == [without_clock(a) for a in whole]


def without_clock(line):
    return {k: v for k, v in line.items() if k != "seconds"}


@every_case
def test_partial_participation_resumes_bit_for_bit(case, tmp_path):
    """The sampled clients depend on the seed and the round, not on node ids."""
    kw = {"method": case.method, "fraction_train": 0.4, "clients": 5, **case.settings}
    run(tmp_path / "whole", **kw)
    run(tmp_path / "cut", stop_after=3, **kw)
    run(tmp_path / "cut", first_node=9000, **kw)
    same = [(tmp_path / d / "mask.fedmask").read_bytes() for d in ("whole", "cut")]
    assert same[0] == same[1]


@every_case
def test_reported_bytes_are_the_frames_bytes(case, tmp_path):
    seen = []

    def tamper(reply, message, context):
        seen.append((frame_of(message), frame_of(reply)))
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, method=case.method, num_server_rounds=2, **case.settings)
    for number, line in enumerate(lines):
        pairs = seen[3 * number : 3 * number + 3]
        down, up = (sum(len(p[i]) for p in pairs) for i in (0, 1))
        assert (line["downlink_bytes"], line["uplink_bytes"]) == (down, up)
        d = Frame.parse(pairs[0][1]).fields[0].numel
        assert line["uplink_bpp"] == pytest.approx(8 * up / 3 / d)
        assert line["downlink_bpp"] == pytest.approx(8 * down / 3 / d)
        assert line["flower_uplink_bytes"] > 0
    if case.method != "fedavg":
        assert lines[0]["downlink_bpp"] < lines[1]["downlink_bpp"] < np.log2(4) + 8 * 150 / d


def frame_of(message):
    return message.content.array_records["arrays"]["frame"].data


def test_one_frame_a_message(tmp_path):
    _, grid = run(tmp_path / "run", 2, num_server_rounds=1)
    for message in grid.messages:
        (array,) = message.content.array_records["arrays"].values()
        assert array.stype == STYPE


BREAKS = {}


def breaks(function):
    BREAKS[function.__name__] = function
    return function


def with_frame(reply, data, **metrics):
    reply.content.array_records["arrays"]["frame"] = Array("uint8", (1,), STYPE, data)
    reply.content.metric_records["metrics"].update(metrics)
    return reply


@breaks
def missing(reply, _message):
    return None


@breaks
def error_reply(_reply, message):
    return Message(Error(2, "out of memory"), reply_to=message)


@breaks
def duplicated(reply, _message):
    return [reply, reply]  # the second is dropped, the first counts


@breaks
def corrupt(reply, _message):
    frame = bytearray(frame_of(reply))
    frame[len(frame) // 2] ^= 0x10
    return with_frame(reply, bytes(frame))


@breaks
def truncated(reply, _message):
    return with_frame(reply, frame_of(reply)[:-1])


@breaks
def late(reply, _message):
    frame = Frame.parse(frame_of(reply))
    return with_frame(reply, Frame(frame.digest, frame.round_ - 1, frame.fields, frame.meta).to_bytes())


@breaks
def other_model(reply, _message):
    frame = Frame.parse(frame_of(reply))
    return with_frame(reply, Frame(b"another!", frame.round_, frame.fields, frame.meta).to_bytes())


@breaks
def empty_frame(reply, _message):
    frame = Frame.parse(frame_of(reply))
    return with_frame(reply, Frame(frame.digest, frame.round_, (), {}).to_bytes())


@breaks
def huge(reply, _message):
    return with_frame(reply, bytes(1_000_000))


@breaks
def no_metrics(reply, _message):
    del reply.content["metrics"]
    return reply


@breaks
def numpy_array(reply, _message):
    reply.content["arrays"] = ArrayRecord([np.zeros(3)])
    return reply


@breaks
def no_examples(reply, _message):
    reply.content.metric_records["metrics"]["num-examples"] = 0
    return reply


@breaks
def uncountable_metrics(reply, _message):
    reply.content["metrics"] = MetricRecord({"client": [1, 2], "num-examples": 5})
    return reply


@breaks
def junk(_reply, message):
    return Message(RecordDict({"junk": MetricRecord({"x": 1})}), reply_to=message)


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("case", [CASES["deltamask"], CASES["fedavg"]], ids=["deltamask", "fedavg"])
def test_a_broken_client_is_survived_and_counted(name, case, tmp_path):
    def tamper(reply, message, context):
        broken = context.node_config["partition-id"] == 1 and message.content["config"]["server-round"] == 2
        return BREAKS[name](reply, message) if broken else reply

    lines, _ = run(tmp_path / "run", 3, tamper, method=case.method, num_server_rounds=3, **case.settings)
    good = 3 if name == "duplicated" else 2
    assert [line["clients_ok"] for line in lines] == [3, good, 3]
    assert [line["clients_failed"] for line in lines] == [0, 3 - good, 0]
    if name in {"huge", "no_metrics", "corrupt", "no_examples"}:  # what travelled is counted, readable or not
        assert lines[1]["uplink_bytes"] > 1.3 * good * lines[1]["uplink_bpp"] / 8 * 352


def test_a_round_without_any_answer_keeps_the_state(tmp_path):
    def tamper(reply, message, context):
        return None if message.content["config"]["server-round"] == 2 else reply

    lines, grid = run(tmp_path / "run", 3, tamper, num_server_rounds=3)
    assert [line["clients_ok"] for line in lines] == [3, 0, 3]
    frames = [Frame.parse(frame_of(m)) for m in grid.messages[::3]]
    assert bytes(frames[1].fields[0].body) == bytes(frames[2].fields[0].body)


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
    assert lines[-1]["downlink_bytes"] == evaluated


def test_too_few_nodes_is_an_error_that_names_the_fix(tmp_path):
    with pytest.raises(TimeoutError, match=r"2 of 5 nodes.*min-nodes"):
        run(tmp_path / "run", 2, min_nodes=5, node_timeout=0.01)


def test_another_run_s_folder_is_refused(tmp_path):
    run(tmp_path / "run", 2, num_server_rounds=1)
    with pytest.raises(RunDirError, match="seed: 7 then, 8 now"):
        run(tmp_path / "run", 2, num_server_rounds=1, seed=8)


def test_a_damaged_checkpoint_is_an_error_that_names_the_fix(tmp_path):
    run(tmp_path / "run", 2, stop_after=1)
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="--overwrite"):
        run(tmp_path / "run", 2)


def test_a_full_disk_costs_no_round(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    real, failures = track.save_state, [OSError(28, "No space left on device")]

    def save_state(*args):
        if len(args[2]) and args[2]["round"] == 3 and failures:
            raise failures.pop()
        real(*args)

    monkeypatch.setattr(track, "save_state", save_state)
    lines, _ = run(tmp_path / "run")
    assert not failures
    assert [without_clock(a) for a in lines] == [without_clock(a) for a in whole]
    assert (tmp_path / "run/mask.fedmask").read_bytes() == (tmp_path / "whole/mask.fedmask").read_bytes()


def test_a_wrong_key_is_an_error_that_lists_the_right_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown run-config key kapa\. Did you mean kappa"):
        run(tmp_path / "run", 2, kapa=0.5)


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


def test_two_nodes_with_one_number_are_both_dropped(tmp_path):
    """Whoever answers first must not decide."""

    def tamper(reply, message, context):
        if context.node_config["partition-id"] == 2:
            reply.content.metric_records["metrics"]["client"] = 0
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, num_server_rounds=1)
    assert (lines[0]["clients_ok"], lines[0]["clients_failed"]) == (1, 2)


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


def test_hostile_evaluations_are_counted_and_left_out(tmp_path):
    def tamper(reply, message, context):
        if message.metadata.message_type == "evaluate":
            metrics = reply.content.metric_records["metrics"]
            match context.node_config["partition-id"]:
                case 0:
                    metrics["loss"], metrics["num-examples"] = float("nan"), 5
                case 1:
                    metrics["num-examples"] = 2**62
                case 2:
                    return None
        return reply

    lines, _ = run(tmp_path / "run", 4, tamper, num_server_rounds=1, fraction_evaluate=1.0)
    assert lines[0]["evaluations_failed"] == 2
    assert np.isfinite(lines[0]["client_loss"])


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


def test_no_matplotlib_costs_the_picture_only(tmp_path, monkeypatch):
    def plot_curve(*_):
        raise ImportError("matplotlib")

    monkeypatch.setattr(show, "plot_curve", plot_curve)
    run(tmp_path / "run", 2, num_server_rounds=1)
    assert (tmp_path / "run/mask.fedmask").exists()
    assert not (tmp_path / "run/curve.png").exists()


def test_a_full_disk_at_the_end_is_made_good_by_the_same_command(tmp_path, monkeypatch):
    def full(path, data):
        if path.name == "mask.fedmask":
            raise OSError(28, "No space left on device")
        atomic(path, data)

    monkeypatch.setattr(track, "write_atomic", full)
    lines, _ = run(tmp_path / "run", 2, num_server_rounds=2)
    assert len(lines) == 2
    assert not (tmp_path / "run/mask.fedmask").exists()
    monkeypatch.setattr(track, "write_atomic", atomic)
    run(tmp_path / "run", 2, num_server_rounds=2)
    assert (tmp_path / "run/mask.fedmask").exists()


def test_a_run_that_never_finished_a_round_can_be_corrected(tmp_path):
    with pytest.raises(ValueError, match="matches no parameter"):
        run(tmp_path / "run", 2, include="layers.*")
    run(tmp_path / "run", 2, num_server_rounds=1)


def test_a_node_cannot_answer_as_another_client(tmp_path):
    def tamper(reply, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 2:
            reply.content.metric_records["metrics"]["client"] = 0
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, method="personal:Personal", num_server_rounds=1)
    assert (lines[0]["clients_ok"], lines[0]["clients_failed"]) == (2, 1)
