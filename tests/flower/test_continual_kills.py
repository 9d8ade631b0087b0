"""Servers and clients of continual runs that are killed."""

from __future__ import annotations

import pytest
from continual_runs import go, same
from flwr.app import RecordDict
from rounds import Killed

from fedmask_flwr.checkpoint import CheckpointError
from fedmask_flwr.flower.device import Device

pytestmark = pytest.mark.flower


@pytest.mark.parametrize(("rounds", "deaf"), [(2, True), (4, False), (4, True)])
def test_a_server_killed_within_a_task_resumes_bit_for_bit(rounds, deaf, whole, tmp_path):
    go(tmp_path / "cut", retrieve=1, stop_after=rounds, deaf=deaf)
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == rounds
    lines, _ = go(tmp_path / "cut", retrieve=1, first_node=5000)
    same((lines, tmp_path / "cut"), whole)


def test_clients_that_restart_go_on_from_their_disks(whole, tmp_path):
    """In every round every device is a new process: nothing but its memory's file is left of it."""

    def tamper(reply, message, context):
        context.state = RecordDict()
        return reply

    lines, _ = go(tmp_path / "run", tamper=tamper, retrieve=1)
    same((lines, tmp_path / "run"), whole)


def test_all_killed_while_a_client_trains(whole, tmp_path, monkeypatch):
    """Client 1 dies within its loop, client 0 has trained the round, and the server goes down with them."""
    train, round_ = Device.train, 5

    def dying(self, optimizer, turn, epochs, *purpose):
        loss = train(self, optimizer, turn, epochs, *purpose)
        if (turn.round, turn.client) == (round_, 1):
            raise Killed
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Device, "train", dying)
        go(tmp_path / "cut", retrieve=1)
    assert len((tmp_path / "cut/metrics.jsonl").read_text().splitlines()) == round_ - 1
    lines, _ = go(tmp_path / "cut", retrieve=1, first_node=7000)
    same((lines, tmp_path / "cut"), whole)


def test_a_checkpoint_cut_in_half_is_named_and_nothing_deleted(tmp_path):
    out = tmp_path / "run"
    go(out, stop_after=2)
    path = out / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def files():
        return {
            file: file.read_bytes()
            for file in out.rglob("*")
            if file.is_file() and file.name not in (".lock", "failed.txt")
        }

    before = files()
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.safetensors is not a checkpoint of WeitState.*restore it"
    ):
        go(out)
    assert files() == before
