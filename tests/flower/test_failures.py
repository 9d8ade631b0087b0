"""What breaks in a round is survived, counted, and said."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from loopback import LoopbackGrid
from rounds import frame_of, run, served, without_clock

from client_app.main import app
from fedmask_flwr import show, track
from fedmask_flwr.checkpoint import CheckpointError
from fedmask_flwr.checkpoint import write_atomic as atomic
from fedmask_flwr.config import ConfigError
from fedmask_flwr.flower.records import STYPE
from fedmask_flwr.track import RunDirError
from fedmask_flwr.wire import Frame, Payload, SideInfo, pack

pytestmark = pytest.mark.flower


BREAKS = {}
ANY = ("deltamask", "fedavg", "fedmask")


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
@pytest.mark.parametrize("case", [CASES[name] for name in ANY], ids=ANY)
def test_a_broken_client_is_survived_and_counted(name, case, tmp_path):
    def tamper(reply, message, context):
        if message.metadata.message_type != "train" or context.node_config["partition-id"] != 1:
            return reply
        return BREAKS[name](reply, message) if message.content["config"]["server-round"] == 2 else reply

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


def test_two_nodes_with_one_number_are_both_dropped(tmp_path):
    """Whoever answers first must not decide."""

    def tamper(reply, message, context):
        if context.node_config["partition-id"] == 2:
            reply.content.metric_records["metrics"]["client"] = 0
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, num_server_rounds=1)
    assert (lines[0]["clients_ok"], lines[0]["clients_failed"]) == (1, 2)


def of_node(number, client, round_=1):
    """The reply of one node, from some round on, says it is another client."""

    def tamper(reply, message, context):
        there = message.metadata.message_type == "train" and context.node_config["partition-id"] == number
        if there and int(message.content["config"]["server-round"]) >= round_:
            reply.content.metric_records["metrics"]["client"] = client
        return reply

    return tamper


def test_a_node_that_says_it_is_another_one_does_not_silence_it(tmp_path, caplog):
    """Who spoke for a client before goes on, and nobody becomes somebody else."""
    lines, _ = run(tmp_path / "run", 3, of_node(2, 0, round_=2), num_server_rounds=3)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(3, 0), (2, 1), (2, 1)]
    assert "it answers as client 0, but was client 2 before" in caplog.text
    caplog.clear()

    class Newcomer(LoopbackGrid):
        """A fourth node, from round 2 on, that says it is the first client."""

        def get_node_ids(self):
            nodes = super().get_node_ids()
            return nodes if self.messages else nodes[:3]

    grid = Newcomer(app, 4, {}, of_node(3, 0))
    lines = served(tmp_path / "newcomer", grid, 3, num_server_rounds=3)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(3, 0), (3, 1), (3, 1)]
    assert "2 nodes say they are client 0: give each its own client-id" in caplog.text


def test_a_device_that_was_started_again_goes_on_under_another_node(tmp_path):
    """Its old node is still there, and silent."""

    class Restarted(LoopbackGrid):
        def get_node_ids(self):
            nodes = super().get_node_ids()
            return nodes if self.messages else nodes[:3]

    def tamper(reply, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            return reply if int(message.content["config"]["server-round"]) == 1 else None
        return of_node(3, 0)(reply, message, context)

    lines = served(tmp_path / "run", Restarted(app, 4, {}, tamper), 3, num_server_rounds=3)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(3, 0), (3, 1), (3, 1)]


def test_a_client_s_words_stay_one_line_of_a_log(tmp_path, caplog):
    def tamper(reply, message, context):
        match context.node_config["partition-id"]:
            case 1:
                return Message(Error(2, "boom\nWARNING node 7 failed " + "x\n" * 10**6), reply_to=message)
            case 2:
                reply.content.metric_records["metrics"]["num-examples"] = [1.0] * 10**5
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, num_server_rounds=1)
    assert (lines[0]["clients_ok"], lines[0]["clients_failed"]) == (1, 2)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2
    assert all(len(text) < 300 and "\n" not in text for text in told)


def test_a_weight_that_the_run_s_codec_cannot_hold_costs_its_client_alone(tmp_path, caplog):
    """In float32 it can be read; the mean of all must travel in float16."""

    def tamper(reply, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            frame = Frame.parse(frame_of(reply))
            (field,) = frame.fields
            weights = np.full(field.numel, 1e30, np.float32)
            raw = pack(Payload(dense={"weights": weights}), digest=frame.digest, round_=frame.round_, known=None)
            reply.content.array_records["arrays"]["frame"] = Array("uint8", (1,), STYPE, raw)
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, method="fedavg", weights_codec="float16", num_server_rounds=2)
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(2, 1), (2, 1)]
    assert "a weight of 1e+30 is beyond 65504" in caplog.text


@pytest.mark.parametrize("method", ["deltastep", "deltamask"])
def test_a_reply_that_may_have_flipped_bits_is_refused_unless_the_run_says_so(method, tmp_path, caplog):
    def tamper(reply, message, context):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            frame = Frame.parse(frame_of(reply))
            bits = {"mask": np.zeros((frame.fields[0].numel + 7) // 8, np.uint8)}
            known = SideInfo((frame.fields[0].numel,))
            raw = pack(
                Payload(bits=bits), digest=frame.digest, round_=frame.round_, known=known, codecs={"bits": "fuse8"}
            )
            reply.content.array_records["arrays"]["frame"] = Array("uint8", (1,), STYPE, raw)
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, method=method, num_server_rounds=1)
    assert (lines[0]["clients_ok"], lines[0]["clients_failed"]) == (2, 1)
    assert "'mask' came as fuse8, which may flip bits" in caplog.text


@pytest.mark.parametrize("method", ["deltamask", "deltastep"])
def test_a_budget_is_one_for_codec_auto(method, tmp_path):
    with pytest.raises(ValueError, match=r"target-bpp of .* is a budget for codec auto: with rice no round"):
        run(tmp_path / "run", 2, method=method, target_bpp=0.05, codec="rice")


@pytest.mark.parametrize(("key", "value"), [("step", np.inf), ("margin", np.nan), ("alpha", np.inf)])
def test_numbers_are_finite(key, value, tmp_path):
    with pytest.raises(ConfigError, match="finite"):
        run(tmp_path / "run", 2, method="drawstep", **{key: float(value)})


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


@pytest.mark.parametrize("accuracy", [1e200, -0.1, 1.5])
def test_an_evaluation_that_cannot_be_is_counted(accuracy, tmp_path):
    def tamper(reply, message, context):
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 0:
            reply.content.metric_records["metrics"]["accuracy"] = accuracy
        return reply

    lines, _ = run(tmp_path / "run", 3, tamper, method="fedavg", fraction_evaluate=1.0, num_server_rounds=2)
    assert [line["evaluations_failed"] for line in lines] == [1, 1]
    assert all(0 <= line["client_accuracy_worst"] <= line["client_accuracy_mean"] <= 1 for line in lines)


def test_training_metrics_cannot_pose_as_measured_ones(tmp_path):
    def tamper(reply, message, context):
        if message.metadata.message_type == "train":
            forged = {"accuracy_threshold": 2.0, "client_accuracy_mean": 9.0, "own": 3.0}
            reply.content.metric_records["metrics"].update(forged)
        return reply

    lines, _ = run(tmp_path / "run", 2, tamper, method="fedmask", num_server_rounds=2, evaluate_every=2)
    assert [line["own"] for line in lines] == [3.0, 3.0]
    assert not any("accuracy_threshold" in line for line in lines)
    assert "client_accuracy_mean" not in lines[0]
    assert lines[1]["client_accuracy_mean"] <= 1.0


def test_seeds_without_a_comparison_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="seeds are for a comparison"):
        run(tmp_path / "run", seeds="1,2")


def test_a_folder_is_what_a_run_is_where_it_names_the_data(tmp_path):
    here, there = ({"data": "npz", "data-dir": name, "seed": 1} for name in ("a", "b"))
    with pytest.raises(RunDirError, match="data-dir"):
        track.same_run(tmp_path, here, there)
    track.same_run(tmp_path, here | {"data": "mnist"}, there | {"data": "mnist"})


@pytest.mark.parametrize("method", ["signsgd", "mpfl"])
def test_a_lossy_codec_is_refused_where_bits_must_be_exact(method, tmp_path):
    with pytest.raises(ValueError, match="needs an exact codec"):
        run(tmp_path / "run", method=method, codec="fuse8+png", search_rounds=2, keep_min=2)
