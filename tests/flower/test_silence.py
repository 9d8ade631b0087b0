"""A run in which nobody answers ends as failed, says why, and can be started again."""

from __future__ import annotations

import pytest
import tiny
from flwr.app import Error, Message
from rounds import run, without_clock

from fedmask_flwr.flower.patience import SilenceError
from fedmask_flwr.simulation import launch
from fedmask_flwr.standing import stand

pytestmark = pytest.mark.flower


def silent_in(*rounds, reason="ValueError: no rows", nodes=(0, 1, 2)):
    def tamper(reply, message, context):
        if message.metadata.message_type != "train" or message.content["config"]["server-round"] not in rounds:
            return reply
        if context.node_config["partition-id"] not in nodes:
            return None
        return Message(Error(2, reason), reply_to=message)

    return tamper


def test_a_run_without_any_reply_fails_with_the_commonest_reason(tmp_path):
    rounds = silent_in(*range(1, 9), nodes=(0, 2))
    with pytest.raises(SilenceError) as caught:
        run(tmp_path / "run", 3, rounds, num_server_rounds=8)
    said = str(caught.value)
    assert "3 rounds in a row" in said
    assert "6 of 9 failures: ValueError: no rows (code 2)." in said
    assert said.endswith("begins at round 1")
    assert not (tmp_path / "run/checkpoint.safetensors").exists()
    assert not (tmp_path / "run/mask.fedmask").exists()
    found = stand(tmp_path / "run")
    assert (found.state, found.reason) == ("failed", f"SilenceError: {said}")
    run(tmp_path / "run", 3, num_server_rounds=8)
    assert stand(tmp_path / "run").state == "finished"
    assert not (tmp_path / "run/failed.txt").exists()


def test_starting_it_again_goes_on_after_the_last_round_with_a_reply(tmp_path):
    whole, _ = run(tmp_path / "whole", 3, num_server_rounds=6)
    with pytest.raises(SilenceError, match="it goes on after round 2"):
        run(tmp_path / "run", 3, silent_in(3, 4, 5), num_server_rounds=6)
    told = tiny.run_config(num_server_rounds=6)
    assert launch._check_folder(tmp_path / "run", told, overwrite=False) == 2  # what `fedmask run` says
    lines, _ = run(tmp_path / "run", 3, num_server_rounds=6, max_silent_rounds=4)
    assert [without_clock(line) for line in lines] == [without_clock(line) for line in whole]
    assert (tmp_path / "run/mask.fedmask").read_bytes() == (tmp_path / "whole/mask.fedmask").read_bytes()


def test_starting_it_again_cannot_use_up_the_rounds(tmp_path):
    for _ in range(3):
        with pytest.raises(SilenceError, match="2 rounds in a row"):
            run(tmp_path / "run", 3, silent_in(1, 2, 3, 4), num_server_rounds=4, max_silent_rounds=2)


def test_a_run_shorter_than_the_patience_fails_too(tmp_path):
    with pytest.raises(SilenceError, match="2 rounds in a row"):
        run(tmp_path / "run", 3, silent_in(1, 2), num_server_rounds=2)


def test_one_reply_is_enough_to_go_on(tmp_path):
    lines, _ = run(tmp_path / "run", 3, silent_in(2, 3, 5, 6), num_server_rounds=6)
    assert [line["clients_ok"] for line in lines] == [3, 0, 0, 3, 0, 0]
    assert (tmp_path / "run/mask.fedmask").exists()


def test_it_can_be_told_never_to_give_up(tmp_path):
    lines, _ = run(tmp_path / "run", 3, silent_in(1, 2, 3, 4), num_server_rounds=4, max_silent_rounds=0)
    assert [line["clients_ok"] for line in lines] == [0] * 4


def test_a_reason_of_a_client_is_one_short_line(tmp_path):
    with pytest.raises(SilenceError) as caught:
        run(tmp_path / "run", 2, silent_in(1, 2, 3, reason="a\nb" * 5000), num_server_rounds=3)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_nodes_that_do_not_say_who_they_are_are_named(tmp_path):
    def tamper(reply, message, context):
        return None if message.metadata.message_type == "query" else reply

    with pytest.raises(SilenceError, match="4 of 4 failures: it did not tell its client number"):
        run(tmp_path / "run", 2, tamper, method="personal:Personal", num_server_rounds=8, max_silent_rounds=2)
