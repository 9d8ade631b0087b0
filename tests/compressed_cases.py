"""The rows of the compressed methods' tests, and one client's turn on the tiny task."""

from __future__ import annotations

import numpy as np
import oracles_compressed as oracles
import tiny
import torch

from fedmask_flwr.masks import initialise
from fedmask_flwr.methods import Training, Turn, Update
from fedmask_flwr.methods.eden import Eden
from fedmask_flwr.methods.fedcode import FedCode
from fedmask_flwr.methods.qsgd import QSGD
from fedmask_flwr.methods.signsgd import SignSGD
from fedmask_flwr.methods.topk import TopK
from fedmask_flwr.wire import pack, unpack

TURN = Turn(seed=1, round=1, rounds=9, client=0)
ROWS = {
    "topk": (TopK, {"share": 0.1}, oracles.topk, oracles.topk_reply),
    "topk-all": (TopK, {"share": 1.0}, oracles.topk, oracles.topk_reply),
    "signsgd": (SignSGD, {"server_lr": 0.03}, oracles.signsgd, oracles.sign_reply),
    "qsgd": (QSGD, {"bucket": 100}, oracles.qsgd, oracles.qsgd_reply),
    "qsgd-tensor": (QSGD, {"bucket": 0, "levels": 1}, oracles.qsgd, oracles.qsgd_reply),
    "eden": (Eden, {}, oracles.eden, oracles.eden_reply),
    "fedcode": (FedCode, {"centres": 8}, oracles.fedcode, oracles.fedcode_reply),
}


def build(kind, config=None, make=tiny.norm_net):
    torch.manual_seed(3)
    model = make()
    if make is not tiny.norm_net:  # initial weights that are named by a seed come without running statistics
        initialise(model, "seed:3")
    return kind(kind.layout(model), model, kind.Config(**(config or {}))), model


def some_round(row, method, state, number, clients):
    rngs = [np.random.default_rng([number, k]) for k in range(clients)]
    return [Update(k, ROWS[row][3](method, state, k, rng), float(k + 1), 0.0) for k, rng in enumerate(rngs)]


def train(method, model, got, turn, memory, *, epochs=2, lr=0.02, data=None):
    x, y = (torch.from_numpy(a) for a in (data or tiny.blobs("train", "")))
    torch.manual_seed(turn.round)
    optimizer = method.begin(got, model, Training(lr=lr), turn, memory)
    model.train()
    for rows in [r for _ in range(epochs) for r in torch.randperm(len(x)).split(25)]:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return method.finish(got, model, optimizer, turn, memory)


def sent(method, payload, got, turn):
    """The payload after a frame."""
    known, forms = method.known(got, turn, {}), method.up(got, {})
    frame = pack(payload, digest=b"eight by", round_=turn.round, known=known, codecs=method.codecs)
    expect = {name: n for form in forms for name, (_, n) in form.items()}
    back = unpack(frame, digest=b"eight by", round_=turn.round, known=known, expect=expect).payload
    assert {*back.bits, *back.counts, *back.dense} in [set(form) for form in forms]
    return back
