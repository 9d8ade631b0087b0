"""A round as a server meets it, made without clients: a state after one round, and replies to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedmask_flwr.masks import divergence
from fedmask_flwr.methods import Turn, resolve
from fedmask_flwr.methods.beta import BetaState
from fedmask_flwr.methods.klms import Sampling
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.methods.stepping import LEVELS, SteppingMethod
from fedmask_flwr.wire import Counts, Payload, pack, pack_bits

METHODS = {
    "fedpm": {},
    "deltamask": {"kappa": 1.0, "kappa-min": 1.0},
    "deltastep": {},
    "klms": {"downlink": "relay"},
    "drawstep": {"downlink": "relay"},
}
DEVICES, VOTES, MOVED = 4, 10, 0.01
STEP = 1 << 22  # positions drawn at a time
DIGEST = bytes(8)


def built(name: str, numel: int):
    """The method, for ten square layers on the meta device: layout without weights."""
    kind = resolve(name)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(numel // 10 // (side := 100), side, bias=False) for _ in range(10)))
    return kind(kind.layout(model), model, kind.Config(**METHODS[name]))


def begun(method, rng):
    """A state after one round: ten votes a bit, four in five of them unanimous."""
    ones = np.empty(method.numel, np.uint32)
    table = np.repeat(np.arange(VOTES + 1), [100, 8, 6, 5, 4, 4, 4, 5, 6, 8, 106]).astype(np.uint32)
    total = VOTES
    if isinstance(method, SteppingMethod):
        total, low = LEVELS, round(method.config.epsilon * LEVELS) + 1
        table = np.clip(table * (LEVELS // VOTES), low, LEVELS - low)
    for a in range(0, ones.size, STEP):
        n = min(STEP, ones.size - a)
        ones[a : a + n] = table[rng.integers(0, 256, n, np.uint8)]
    state = BetaState(ones, total, 1, 0.0)
    return replace(state, trail=replace(state.trail, now=1))


def frames(method, state, rng):
    """Replies of a few devices to that state, in round 2: what they learned is drawn, all else is real."""
    told = method.broadcast(state)
    theta = method.of_theta(told, lambda t: t.astype(np.float32))
    share = method.step(Turn(7, 2, 99, 0)) if isinstance(method, SteppingMethod) else 1.0
    bits = 0.0
    for a in range(0, theta.size, STEP):
        part = theta[a : a + STEP]
        g = part.astype(np.float64)
        part += (MOVED / share * np.sqrt(np.pi / 2)) * rng.standard_normal(part.size, np.float32)
        np.clip(part, 0.002, 0.998, out=part)
        if isinstance(method, Sampling):
            bits += float(divergence(part.astype(np.float64), g).sum())
    made = []
    for device in range(DEVICES):
        turn = Turn(7, 2, 99, device)
        if isinstance(method, Sampling):
            size = method.blocks(bits)
            index = rng.integers(0, 1 << method.each, size).astype(np.uint32)
            payload = Payload(counts={"index": Counts(index, (1 << method.each) - 1)})
        else:
            payload = Payload(bits={"mask": pack_bits(method.draw(theta, turn))})
        made.append(
            pack(payload, digest=DIGEST, round_=2, known=method.known(told, turn, {}), codecs=method.codecs)
        )
    return made


def decoded(method, state, frame, client):
    """What the strategy makes of a reply, before it is counted: (received, payload)."""
    turn = Turn(7, 2, 99, client)
    told, shared = method.understood(state, client), method.recall(state, client)
    received = read_reply(frame, method, told, turn, shared, digest=DIGEST)
    return received, method.reconstruct(told, received.payload, turn)
