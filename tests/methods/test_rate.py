"""Rate control: a budget in bits a parameter holds in every round, on real frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedmask_flwr.masks import MaskAdam, initialise, model_digest
from fedmask_flwr.methods import Turn, resolve
from fedmask_flwr.wire import Counts, Payload, pack

TARGET = 0.05


def turn_of(name, drift, target, **settings):
    """A reply's frame after training that moved the scores by about ``drift``, and the method."""
    model = nn.Sequential(nn.Linear(200, 900), nn.Linear(900, 10))
    initialise(model, "seed:3")
    found = resolve(name)
    method = found(found.layout(model), model, found.Config(target_bpp=target, **settings))
    rng, turn = np.random.default_rng(5), Turn(1, 2, 4, 3)
    got = Payload(counts={"ones": Counts(rng.integers(0, 11, method.numel).astype(np.uint32), 10)})
    theta = method.theta(got)
    moved = np.log(theta / (1 - theta)) + drift * rng.normal(size=method.numel)
    optimizer = MaskAdam(model, method.spec, theta=torch.from_numpy(1 / (1 + np.exp(-moved))))
    reply = method.finish(got, model, optimizer, turn, {})
    known = method.known(got, turn, {})
    return pack(reply, digest=model_digest(method.spec, model), round_=2, known=known), method


@pytest.mark.parametrize("name", ["deltamask", "deltastep", "drawstep", "klms"])
@pytest.mark.parametrize("drift", [0.05, 0.3, 1.0, 3.0])
def test_a_budget_holds_and_is_used(name, drift):
    settings = {"kappa": 1.0, "kappa_min": 1.0} if name == "deltamask" else {}
    frame, method = turn_of(name, drift, TARGET, **settings)
    free, _ = turn_of(name, drift, 0.0, **settings)
    spent, wanted = 8 * len(frame) / method.numel, 8 * len(free) / method.numel
    assert spent <= 1.05 * TARGET
    if wanted > 1.1 * TARGET:
        assert spent >= 0.85 * TARGET
    elif wanted < 0.9 * TARGET:
        assert len(frame) == len(free)
    else:
        assert len(frame) == pytest.approx(len(free), abs=16)


def test_without_a_budget_the_change_decides():
    sizes = [len(turn_of("deltamask", drift, 0.0)[0]) for drift in (0.05, 0.3, 1.0)]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[0]
