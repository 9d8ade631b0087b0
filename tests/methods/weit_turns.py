"""A continual federation of tiny MADEs over the Method API: real frames, devices with memories, no Flower."""

from __future__ import annotations

from dataclasses import replace

import tiny
import torch
from federation import DIGEST

from fedmask_flwr.made import made
from fedmask_flwr.masks import frozen_weights, initialise
from fedmask_flwr.methods import Training, Turn, Update, View
from fedmask_flwr.methods.confedmade import ConfedMADE
from fedmask_flwr.train import train
from fedmask_flwr.wire import pack, unpack

ROUNDS = 4  # of a task


def network(inputs=8, hidden=16, **options):
    """A MADE with its named weights."""
    model = made((inputs,), 1, hidden=hidden, **options)
    initialise(model, "seed:3:glorot")
    return model


def build(model=None, kind=ConfedMADE, **settings):
    model = network() if model is None else model
    return kind(kind.layout(model), model, kind.Config(**settings))


def examples(source, split="train"):
    """Rows of one source and labels that nobody reads."""
    x, y = map(torch.from_numpy, tiny.sources(split, ""))
    return x[y == source], y[y == source]


def nll(model, x, y):
    return model.nll(x), None


def judged(model, source):
    """NLL on the tests of a source, nats."""
    with torch.no_grad():
        return float(model.eval().nll(examples(source, "test")[0]).mean())


def over_the_wire(method, payload, fields, known, round_, codecs=None):
    """The payload as the other end reads it, and its frame."""
    frame = pack(payload, digest=DIGEST, round_=round_, known=known, codecs=codecs or method.codecs)
    expect = {name: numel for form in fields for name, (_, numel) in form.items()}
    return unpack(frame, digest=DIGEST, round_=round_, known=known, expect=expect).payload, frame


class Device:
    """What one client has: a number, a memory and a task's source."""

    def __init__(self, method, client, make=network, private=False, lr=0.01):
        self.method, self.client, self.make, self.private, self.lr = method, client, make, private, lr
        self.memory = {}
        self.trained = self.frame = self.told = None

    def turn(self, state, source, steps=2):
        """One turn in the round that ``state`` is in, ``steps`` epochs; the reply as the server reads it."""
        method, now = self.method, Turn(1, state.clock, 99, self.client, self.private)
        sent, fields = method.broadcast(state, self.client), [method.down({})]
        got, self.told = over_the_wire(method, sent, fields, method.heard({}), state.clock)
        self.got, model = got, self.make()
        optimizer = method.begin(got, model, Training(lr=self.lr), now, self.memory)
        self.began = dict(self.memory)
        x, y = examples(source)
        train(model, optimizer, x, y, epochs=steps, batch_size=32, key=(1, state.clock, self.client), losses=nll)
        self.trained, self.optimizer = model, optimizer
        reply = method.finish(got, model, optimizer, now, self.memory)
        back, self.frame = over_the_wire(method, reply, method.up(got, {}), method.known(got, now, {}), state.clock)
        return back

    def held(self):
        """Ids of the entries in its memory."""
        return sorted(int(name.split(".")[1]) for name in self.memory if name.startswith("kb.") and "where" in name)

    def network(self, task=None):
        """Its network of a task (None: the latest)."""
        model = self.make()
        self.method.install(
            None, model, frozen_weights(model, self.method.spec), View(memory=self.memory, task=task)
        )
        return model


def begun(method, state, rounds=2 * ROUNDS):
    """The state in which the next of ``rounds`` rounds begins."""
    return method.advance(state, Turn(1, state.clock + 1, rounds, 0))


def folded(method, state, replies):
    """The state after replies, by client."""
    updates = [Update(client, reply, 1.0, 0.0) for client, reply in replies.items()]
    for update in updates:
        method.check(state, update)
    return method.aggregate(state, iter(updates))


def play(method, devices, state, rounds, source, steps=2, lost=()):
    """Rounds of two tasks: ``source(client, task)`` is learned, replies (round, client) in ``lost`` do not come."""
    for _ in range(rounds):
        state = begun(method, state)
        replies = {d.client: d.turn(state, source(d.client, state.task), steps) for d in devices}
        state = folded(method, state, {k: r for k, r in replies.items() if (state.clock, k) not in lost})
    return state


def different(client, task):
    """Each client has other sources, in every task."""
    return (client + 2 * task) % 4


def alike(payload, other):
    """Bitwise equality of two payloads."""
    assert payload.meta == other.meta
    for one, two in ((payload.bits, other.bits), (payload.dense, other.dense)):
        assert one.keys() == two.keys()
        assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    assert {n: c.values.tolist() for n, c in payload.counts.items()} == {
        n: c.values.tolist() for n, c in other.counts.items()
    }
    return True


def edited(payload, *, meta=None, **fields):
    """A payload with other meta data, and other fields by kind."""
    changed = {kind: {**getattr(payload, kind), **values} for kind, values in fields.items()}
    return replace(payload, **changed, meta={**payload.meta, **(meta or {})})
