"""FedMask's turns by hand: what both test files of the method need."""

from __future__ import annotations

import numpy as np
import tiny
import torch

from fedmask_flwr.flower.records import read_broadcast
from fedmask_flwr.masks import frozen_weights, initialise
from fedmask_flwr.methods import Training, Turn, Update, View, resolve
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.train import train
from fedmask_flwr.wire import Counts, Payload, pack, pack_bits

DIGEST = b"contract"
TRAINING = Training()


def build(model=None, **config):
    model = fresh_model() if model is None else model
    kind = resolve("fedmask")
    return kind(kind.layout(model), model, kind.Config(**config))


def fresh_model():
    model = tiny.net()
    initialise(model, "seed:3")
    return model


def first(method, support, mask):
    """A first reply from bool vectors (d,)."""
    values = np.where(support, np.where(mask, 2, 1), 0).astype(np.uint32)
    return Payload(counts={"first": Counts(values, 2)})


def later(support, mask):
    """A later reply of a device with that support."""
    return Payload(bits={"mask": pack_bits(mask[support])})


def update(client, payload):
    return Update(client, payload, 1.0, 0.0)


def fold(method, state, **payloads):
    """Aggregate replies k0=..., k1=..."""
    return method.aggregate(state, [update(int(name[1:]), payload) for name, payload in sorted(payloads.items())])


def hear(method, state, turn, memory):
    """What the device makes of its broadcast, through the wire."""
    shared = method.recall(state, turn.client)
    frame = pack(
        method.broadcast(state, turn.client),
        digest=DIGEST,
        round_=turn.round,
        known=method.heard(shared),
        codecs=method.codecs,
    )
    return read_broadcast(frame, method, memory, digest=DIGEST, round_=turn.round)


def answer(method, state, got, payload, turn, memory, codec="auto"):
    """What the server makes of the reply, through the wire."""
    known = method.known(got, turn, memory)
    frame = pack(payload, digest=DIGEST, round_=turn.round, known=known, codecs={**method.codecs, "bits": codec})
    told, shared = method.broadcast(state, turn.client), method.recall(state, turn.client)
    received = read_reply(frame, method, told, turn, shared, digest=DIGEST, lossy=codec)
    found = update(turn.client, received.payload)
    method.check(state, found)
    return found


def rows_of(client, clients=3):
    """A client's share of the blobs."""
    x, y = tiny.blobs("train", "")
    return torch.from_numpy(x[client * 50 : client * 50 + 50]), torch.from_numpy(y[client * 50 : client * 50 + 50])


def take_turn(method, state, turn, memory, *, training=TRAINING, epochs=1, codec="auto"):
    """One device's whole turn over the wire: the server's Update, the model and the optimiser."""
    model, got = fresh_model(), hear(method, state, turn, memory)
    optimizer = method.begin(got, model, training, turn, memory)
    train(model, optimizer, *rows_of(turn.client), epochs=epochs, batch_size=16, key=(turn.round, turn.client))
    payload = method.finish(got, model, optimizer, turn, memory)
    return answer(method, state, got, payload, turn, memory, codec), model, optimizer


def network(method, state, turn, memory):
    """The device's installed network."""
    model, got = fresh_model(), hear(method, state, turn, memory)
    method.install(got, model, frozen_weights(model, method.spec), View(memory=memory))
    return model, got


def mask_in(method, model):
    """Positions of the masked weights that are not 0."""
    return frozen_weights(model, method.spec).numpy() != 0


def play(method, rounds, clients=3, epochs=2, **kw):
    """Rounds of ``clients`` devices; the last state and the memories."""
    state, memories = method.init(), [{} for _ in range(clients)]
    for round_ in range(1, rounds + 1):
        turns = [Turn(1, round_, rounds, k) for k in range(clients)]
        updates = [
            take_turn(method, state, turn, memory, epochs=epochs, **kw)[0]
            for turn, memory in zip(turns, memories, strict=True)
        ]
        state = method.aggregate(state, iter(updates))
    return state, memories
