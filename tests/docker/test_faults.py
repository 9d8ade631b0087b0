"""Three devices in containers: nobody fails, and each part dies once. Judged by what the run wrote itself."""

from __future__ import annotations

import json
import time
from functools import cache

import pytest
from reference import reference
from stack import docker, sh, until

from fedmask_flwr.simulation.sandbox import scripts

pytestmark = [pytest.mark.slow, pytest.mark.docker]
SETTINGS = {"num_server_rounds": 4, "seed": 11, "local_epochs": 8}
METHOD, PERSONAL = "deltamask", "fedmask"
POINT = 0.01


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """The run of a method that nobody disturbed, in simulation: its lines, its mask."""

    @cache
    def run(method):
        folder = tmp_path_factory.mktemp("simulation") / "run"
        told = [f"-c{key.replace('_', '-')}={value}" for key, value in SETTINGS.items()]
        command = scripts() / "fedmask", "run", "--method", method, "--data", "digits", "--clients", 3, *told
        for left in (2, 1, 0):  # Ray gives up starting on a busy machine
            if sh(*command, "--out", folder, check=not left, OMP_NUM_THREADS="1").returncode == 0:
                break
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return lines, (folder / "mask.fedmask").read_bytes()

    return run


def rounds(lines):
    return [line["round"] for line in lines]


def figures(lines):
    """All that a round's line says besides its time."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.compose_smoke
def test_equals_simulation(stack, simulated):
    """Bit for bit, mask and figures."""
    lines = stack.finished(stack.start("whole", **SETTINGS))
    expected, mask = simulated(METHOD)
    assert (stack.folder / "whole/mask.fedmask").read_bytes() == mask
    assert figures(lines) == figures(expected)
    assert "[round 4]" in (stack.folder / "whole/flower.log").read_text()


def test_node_killed_mid_round(stack, simulated):
    """One round lacks it and says so; it comes back as who it was, with its personal mask."""
    runner = stack.start("killed", method=PERSONAL, round_timeout=300.0, **SETTINGS)
    stack.await_round("killed", 1)
    kept = memory(stack, "node1")
    until(lambda: stack.training("node1"), "node1 trains")
    docker("kill", stack.container("node1"))
    time.sleep(3)
    docker("start", stack.container("node1"))
    lines = stack.finished(runner)
    assert rounds(lines) == [1, 2, 3, 4]
    assert (lines[0]["clients_failed"], lines[1]["clients_failed"]) == (0, 1)
    assert lines[-1]["clients_ok"] == 3
    now = memory(stack, "node1")
    assert len({(run, client) for run, client, _ in kept}) == 1
    assert {(run, client) for run, client, _ in now} == {(run, client) for run, client, _ in kept}, "it began anew"
    assert max(now)[2] == 4
    assert lines[-1]["client_accuracy"] >= simulated(PERSONAL)[0][-1]["client_accuracy"] - POINT


def memory(stack, node):
    """(run, client, round) of each file in a node's memory of the newest run."""
    told = "find", "/memory", "-name", "*.safetensors", "-printf", "%T@ %P\\n"
    found = [
        line.split()[1].split("/") for line in sorted(docker("exec", stack.container(node), *told).splitlines())
    ]
    newest = found[-1][0]
    return [(run, *map(int, name.split(".")[:2])) for run, name in found if run == newest]


def test_link_cut_and_healed(stack, tmp_path):
    """A cut of 20 s while a device trains costs nothing but time.

    Its training is long, as a cut within the upload is another thing: flwr 1.39 then loses the reply, says so after
    three minutes ("Reply message objects are unavailable"), and the round goes on without it.
    """
    told = {**SETTINGS, "num_server_rounds": 2, "local_epochs": 150}
    runner = stack.start("cut", **told)
    stack.await_round("cut", 1)
    until(lambda: stack.training("node2"), "node2 trains")
    network, node = f"{stack.name}_fleet", stack.container("node2")
    docker("network", "disconnect", network, node)
    time.sleep(20)
    docker("network", "connect", "--alias", "node2", network, node)
    lines = stack.finished(runner)
    assert [(line["round"], line["clients_ok"], line["clients_failed"]) for line in lines] == [(1, 3, 0), (2, 3, 0)]
    assert (stack.folder / "cut/mask.fedmask").read_bytes() == reference(tmp_path, **told)[1]


def test_superlink_killed(stack, simulated):
    """Its state is on a volume: the same run goes on, and nothing of it is lost."""
    runner = stack.start("superlink", **SETTINGS)
    stack.await_round("superlink", 1)
    until(lambda: stack.training("node0"), "node0 trains")
    docker("kill", stack.container("superlink"))
    time.sleep(5)
    docker("start", stack.container("superlink"))
    unharmed(stack, "superlink", stack.finished(runner), simulated)


def test_serverapp_killed(stack, simulated):
    """Started again, it goes on after the last whole round."""
    runner = stack.start("serverapp", **SETTINGS)
    stack.await_round("serverapp", 2)
    file = stack.folder / "serverapp/metrics.jsonl"
    began = file.read_text().splitlines()[:2]
    docker("kill", stack.container("serverapp"))
    time.sleep(3)
    docker("start", stack.container("serverapp"))
    lines = stack.finished(runner)
    assert file.read_text().splitlines()[:2] == began, "it computed whole rounds again"
    assert "resuming after round" in (stack.folder / "serverapp/flower.log").read_text()
    unharmed(stack, "serverapp", lines, simulated)


def unharmed(stack, name, lines, simulated):
    """The result of a run is that of the undisturbed one, bit for bit."""
    assert rounds(lines) == [1, 2, 3, 4]
    assert [(line["clients_ok"], line["clients_failed"]) for line in lines] == [(3, 0)] * 4
    assert (stack.folder / name / "mask.fedmask").read_bytes() == simulated(METHOD)[1]
