"""A federation over the Method API alone: real frames, no Flower, every device with a memory of its own."""

from __future__ import annotations

import numpy as np
import tiny
import torch
from torch.nn.functional import cross_entropy

from fedmask_flwr.masks import frozen_weights, initialise
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.train import evaluate, train
from fedmask_flwr.wire import pack, unpack

DIGEST = b"together"


def network(make=tiny.net):
    """The network with its named weights."""
    model = make()
    initialise(model, "seed:3")
    return model


def build(kind, make=tiny.net, include=("*",), exclude=(), **settings):
    """The method, for the network that ``make`` makes."""
    model = network(make)
    return kind(kind.layout(model, include, exclude), model, kind.Config(**settings))


def blobs(split="train"):
    """Examples and labels as tensors."""
    return tuple(torch.from_numpy(a) for a in tiny.blobs(split, ""))


def steps(model, optimizer, n, x=None, y=None):
    """``n`` steps of a user's loop on all examples; the gradients of each step, by parameter."""
    x, y = blobs() if x is None else (x, y)
    seen = []
    for _ in range(n):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return seen


def over_the_wire(payload, fields, known, round_):
    """The payload as the other end reads it, and the bytes that took."""
    frame = pack(payload, digest=DIGEST, round_=round_, known=known)
    expect = {name: numel for name, (_, numel) in fields.items()}
    return unpack(frame, digest=DIGEST, round_=round_, known=known, expect=expect).payload, len(frame)


class Federation:
    """Clients that share the blobs evenly; ``skew`` gives each labels of its own, shifted by its number."""

    def __init__(self, method, make=tiny.net, clients=3, training=None, skew=False):
        self.method, self.make, self.training = method, make, training or Training()
        x, y = blobs()
        parts = torch.arange(len(y)).chunk(clients)  # runs, since every third example is of the same class
        self.data = [(x[rows], (y[rows] + k * skew) % 3) for k, rows in enumerate(parts)]
        self.memory = [{} for _ in range(clients)]
        self.state, self.round, self.skew = method.init(), 0, skew

    def train(self, rounds, epochs=3):
        """Run rounds; the bytes of the last round's replies."""
        method = self.method
        for _ in range(rounds):
            self.round += 1
            updates, sizes = [], []
            for k, (x, y) in enumerate(self.data):
                got, turn, memory = self.told(), Turn(1, self.round, 99, k), self.memory[k]
                model = network(self.make)
                optimizer = method.begin(got, model, self.training, turn, memory)
                train(model, optimizer, x, y, epochs=epochs, batch_size=10, key=(1, self.round, k))
                reply = method.finish(got, model, optimizer, turn, memory)
                form, known = method.up(got, {})[0], method.known(got, turn, {})
                back, size = over_the_wire(reply, form, known, self.round)
                updates.append(Update(k, back, float(len(y)), 0.0))
                sizes.append(size)
            self.state = method.aggregate(self.state, iter(updates))
        return sizes

    def told(self):
        """What a client reads of the broadcast."""
        method = self.method
        return over_the_wire(method.broadcast(self.state), method.down({}), method.heard({}), self.round)[0]

    def network(self, client=None):
        """The installed network of a client, or of the server."""
        model = network(self.make)
        frozen = frozen_weights(model, self.method.spec)
        memory = None if client is None else self.memory[client]
        self.method.install(self.told(), model, frozen, View("expected", memory=memory))
        return model

    def accuracy(self, client=None, adapt=0):
        """On the test blobs, of that client's task; after ``adapt`` epochs of its own."""
        model, k = self.network(client), client or 0
        if adapt:
            turn = Turn(1, self.round, 99, k)
            optimizer = self.method.adapt(self.told(), model, self.training, turn, self.memory[k])
            train(model, optimizer, *self.data[k], epochs=adapt, batch_size=10, key=(1, "adapt", k))
        x, y = blobs("test")
        return evaluate(model, x, (y + k * self.skew) % 3)[1]


def flat(model):
    """All floats, as one vector."""
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
