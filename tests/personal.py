"""A personal method outside the package: each client keeps a posterior of its own, and is told only that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from fedmask_flwr.methods.beta import BetaMethod, trained_theta
from fedmask_flwr.wire import Counts, Payload, SideInfo, pack_bits, unpack_bits


@dataclass(frozen=True, slots=True)
class PersonalState:
    """The last mask of each client, (clients, d)."""

    clients: np.ndarray
    masks: np.ndarray


@final
class Personal(BetaMethod):
    """See the module."""

    name = "personal"
    personal = True
    State = PersonalState

    def known(self, got, turn, shared):
        return SideInfo(self.spec.sizes, pack_bits(self.theta(got) >= 0.5))

    def init(self):
        return PersonalState(np.zeros(0, np.int64), np.zeros((0, self.numel), np.uint32))

    def broadcast(self, state, client=None):
        row = np.flatnonzero(state.clients == client)
        return Payload(counts={"ones": Counts(state.masks[row[0]], 1)}) if row.size else Payload()

    def aggregate(self, state, updates):
        masks = dict(zip(state.clients.tolist(), state.masks, strict=True))
        for update in updates:
            masks[update.client] = unpack_bits(update.payload.bits["mask"], self.numel).astype(np.uint32)
        rows = [masks[k] for k in sorted(masks)]
        return PersonalState(np.array(sorted(masks), np.int64), np.array(rows).reshape(len(rows), self.numel))

    def result(self, state):
        return Payload(bits={"mask": pack_bits(state.masks.mean(axis=0) >= 0.5)})

    def finish(self, got, model, optimizer, turn, memory):
        return Payload(bits={"mask": pack_bits(self.draw(trained_theta(optimizer), turn))})
