"""Devices that follow a server, through real frames, without Flower: some take part, some forget, some are lost."""

from __future__ import annotations

import numpy as np
from federation import blobs, network, steps
from torch import nn

from fedmask_flwr.methods import Training, Turn, Update, resolve
from fedmask_flwr.methods.beta import trained_theta
from fedmask_flwr.methods.reading import read_fields, read_reply
from fedmask_flwr.wire import BitCodec, Frame, Payload, pack

DIGEST = b"fleet..."
ROUNDS = 30


def wide(in_shape=(8,), num_classes=3):
    """2816 weights: enough that headers do not decide what is told."""
    return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, num_classes))


class Fleet:
    """A server and devices that share nothing but frames."""

    def __init__(self, method, clients=5, make=wide, codec="auto", fraction=0.5, steps=2, **settings):
        kind = resolve(method)
        self.make, self.codec, self.lossy, self.steps = make, codec, codec, steps
        self.ends = []
        for share in (fraction, 1.0):  # devices do not know the share of clients that train
            model = network(make)
            self.ends.append(kind(kind.layout(model), model, kind.Config(**settings), fraction=share))
        self.server, self.device = self.ends
        self.memory = {client: {} for client in range(clients)}
        self.state, self.round = self.server.init(), 0
        self.said, self.down, self.up, self.trained = [], 0, {}, {}

    def frame(self, client):
        """What the server sends to a client."""
        server = self.server
        payload, known = server.broadcast(self.state, client), server.heard(server.recall(self.state, client))
        return pack(payload, digest=DIGEST, round_=self.round, known=known, codecs=server.codecs)

    def turn(self, client):
        return Turn(1, self.round, ROUNDS, client)

    def hear(self, client, frame, memory=None):
        """What the device makes of it."""
        device, memory = self.device, self.memory[client] if memory is None else memory
        parsed = Frame.parse(frame)
        if device.personal and not device.in_step(parsed.meta, memory):
            got = Payload(meta=parsed.meta)
        else:
            known = device.heard(memory)
            got = read_fields(parsed, device.down(memory), known, digest=DIGEST, round_=self.round).payload
        return device.complete(got, self.turn(client), memory)

    def train(self, client, got):
        """The device's reply, coded."""
        device, memory, turn = self.device, self.memory[client], self.turn(client)
        model = network(self.make)
        optimizer = device.begin(got, model, Training(), turn, memory)
        x, y = blobs()
        steps(model, optimizer, self.steps, x[client::5], y[client::5])
        self.trained[client] = got, trained_theta(optimizer)
        reply = device.finish(got, model, optimizer, turn, memory)
        codecs = {**device.codecs, "bits": self.codec}
        known = device.known(got, turn, memory)
        return pack(reply, digest=DIGEST, round_=self.round, known=known, codecs=codecs)

    def play(self, present, lost=()):
        """One round; ``lost`` replies do not arrive. Returns why devices failed, by client."""
        self.round += 1
        self.state = self.server.advance(self.state, self.turn(0))
        whole, updates, failed = self.server.broadcast(self.state), [], {}
        for client in present:
            frame = self.frame(client)
            self.down += len(frame)
            self.said.append(next(iter(kinds(frame)), ""))
            try:
                got = self.hear(client, frame)
                same(got, whole)
                reply = self.train(client, got)
            except ValueError as error:
                failed[client] = error
                continue
            if client not in lost:
                updates.append(self.read(client, reply))
        self.state = self.server.aggregate(self.state, iter(updates))
        self.state = self.server.missed(self.state, sorted({*present} - {u.client for u in updates}))
        return failed

    def read(self, client, reply):
        server, turn = self.server, self.turn(client)
        told = server.understood(self.state, client)
        received = read_reply(
            reply, server, told, turn, server.recall(self.state, client), digest=DIGEST, lossy=self.lossy
        )
        self.up[client] = received
        rate = max((c.flip_rate for c in received.codecs.values() if isinstance(c, BitCodec)), default=0.0)
        meant = server.reconstruct(told, received.payload, turn)
        return Update(client, meant, 1.0, rate, received.frame.fields)


def kinds(frame):
    """Names of a frame's fields."""
    return {field.name for field in Frame.parse(frame).fields}


def same(got, whole):
    """Both say the same counts."""
    assert got.counts.keys() == whole.counts.keys()
    assert got.meta == whole.meta
    for name, counts in whole.counts.items():
        assert np.array_equal(got.counts[name].values, counts.values)
        assert got.counts[name].top == counts.top


def some(round_, clients=5, seed=0):
    """Two to four of the clients, at random."""
    rng = np.random.default_rng([seed, round_])
    return sorted(rng.permutation(clients)[: rng.integers(2, 5)].tolist())
