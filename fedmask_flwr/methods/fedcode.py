"""FedCode-style codebooks: weights are a few shared centres, and in most rounds only the centres travel up.

Paper: Khalilian, Tsouvalas, Ozcelebi, Meratnia, "FedCode: Communication-Efficient Federated Learning via
Transferring Codebooks", arXiv 2311.09270. What follows keeps its idea, not its every step.

Every broadcast holds all that a client needs: the codebook C_g of ``centres`` values, and which of them each
weight is (A_g), by k-means of the server's weights. So a client that missed rounds is in step at once. A client
trains from C_g[A_g] and what it could not say before (``rest``). Then, in rounds 1, 1 + f, 1 + 2f, ..
(f = ``calibrate-every``), it clusters its weights and sends C_k and A_k; in the others only C_k, the means of its
weights over the groups of A_g. The server adds the weighted mean of C_k[A_k] - C_g[A_g], or of C_k[A_g] - C_g[A_g],
to weights that it keeps in full precision, so that what clustering takes away comes back in a later broadcast.

Travels: up, 32 ``centres`` bits, and every f-th round at most log2(``centres``) bits a parameter more: 1.2 on
average. Down, at most log2(``centres``) bits a parameter and the codebook, nothing before round 1.

Settings: ``centres``, ``calibrate-every``. The rest as FedAvg.

Limits: between calibrations a network moves in as many directions as there are centres: most is learned in one
round of f. The paper saves on the downlink too (assignments only every other round); here they are always sent.
d floats of memory on the device; a device that loses them goes on from zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, TypeAlias, final

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError

from .base import Fields, Known, Memory, MethodConfig, Training, Turn, Update
from .compressed import Compressed, Floats
from .dense import DenseState, Vector

Groups: TypeAlias = npt.NDArray[np.uint32]
STEPS = 30  # Lloyd steps: from quantiles, more hardly change the error


class FedCodeConfig(MethodConfig):
    """The codebook's size, and how often all is told."""

    centres: int = Field(64, ge=2, le=4096, description="values in the codebook")
    calibrate_every: int = Field(5, ge=1, description="f: rounds from one upload of all assignments to the next")


@final
class FedCode(Compressed):
    """See the module's card."""

    name: ClassVar[str] = "fedcode"
    Config: ClassVar[type[MethodConfig]] = FedCodeConfig

    def code(self) -> Fields:
        """The whole code: centres, and the centre of each weight."""
        return {"codebook": ("dense", self.config.centres), "assignments": ("counts", self.d)}

    def down(self, shared: Memory) -> Fields:
        """The same."""
        return {**self.code(), **self.statistics}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Everything; or, once there was a codebook to train from, the new centres alone."""
        whole = self.down(shared)
        if "codebook" not in got.dense:
            return (whole,)
        return ({name: field for name, field in whole.items() if name != "assignments"}, whole)

    def heard(self, shared: Memory) -> Known:
        """The tensors' sizes."""
        return {"assignments": SideInfo(self.sizes)}

    def broadcast(self, state: DenseState, client: int | None = None) -> Payload:
        """The server's weights, clustered; nothing before the first round."""
        if not state.weights.size:
            return Payload()
        codebook, groups = cluster(state.weights[self.learned].astype(np.float64), self.config.centres)
        told = Payload(counts={"assignments": self.counts(groups)}, dense={"codebook": codebook})
        return self.with_statistics(told, state.weights)

    def counts(self, groups: Groups) -> Counts:
        """Assignments as a field."""
        return Counts(groups, self.config.centres - 1)

    def weights(self, got: Payload) -> Vector:
        """C[A] and the statistics, (n,); the initial weights before the first round."""
        if "codebook" not in got.dense:
            return self.start
        self.check_top(got)
        weights = np.empty_like(self.start)
        weights[self.learned] = got.dense["codebook"][got.counts["assignments"].values]
        weights[~self.learned] = got.dense.get("statistics", 0.0)
        return weights

    def check_top(self, payload: Payload) -> None:
        """Refuse assignments to centres that do not exist."""
        if (top := payload.counts["assignments"].top) != self.config.centres - 1:
            raise WireError(f"assignments 0..{top} to {self.config.centres} centres")

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse such assignments in a reply."""
        super().check(state, update)
        if "assignments" in update.payload.counts:
            self.check_top(update.payload)

    def result(self, state: DenseState) -> Payload:
        """The weights that clients are told."""
        return Payload(dense={"weights": self.weights(self.broadcast(state))})

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Ordinary training from the broadcast weights and what this device could not say before."""
        weights = self.weights(got).copy()
        weights[self.learned] += memory.get("rest", np.float32(0.0))
        self.write(model, weights)
        return self.train_from_here(model, training)

    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """New centres of the old groups; in a calibration round new groups too."""
        weights = self.weights(got)[self.learned] + delta
        if "codebook" in got.dense and (turn.round - 1) % self.config.calibrate_every:
            groups = got.counts["assignments"].values
            codebook = means(weights, groups, got.dense["codebook"])
            payload = Payload(dense={"codebook": codebook})
        else:
            codebook, groups = cluster(weights, self.config.centres)
            payload = Payload(counts={"assignments": self.counts(groups)}, dense={"codebook": codebook})
        memory["rest"] = (weights - codebook[groups]).astype(np.float32)
        return payload

    def decode(self, got: Payload, payload: Payload) -> Floats:
        """C_k[A_k] - C_g[A_g]; A_k is A_g where the reply holds centres alone."""
        groups = payload.counts.get("assignments") or got.counts["assignments"]
        told = self.weights(got)[self.learned].astype(np.float64)
        found: Floats = payload.dense["codebook"][groups.values] - told
        return found

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """A device stores the codebook and a number of log2(centres) bits a weight."""
        floats = self.config.centres + self.floats - self.d
        return {"model_bits": self.d * math.log2(self.config.centres) + 32.0 * floats}


def cluster(x: Floats, m: int) -> tuple[Vector, Groups]:
    """K-means of (d,) values: m centres in ascending order, (m,), and the nearest of each value, (d,).

    Lloyd's steps over sorted values, from their quantiles: no randomness. An empty group keeps its centre.
    """
    ordered = np.sort(x)
    sums = np.concatenate([np.zeros(1), np.cumsum(ordered)])
    centres = ordered[((np.arange(m) + 0.5) * x.size / m).astype(np.int64)]
    for _ in range(STEPS):
        edges = np.concatenate([[0], np.searchsorted(ordered, between(centres)), [x.size]])
        size = np.diff(edges)
        moved = np.where(size > 0, np.diff(sums[edges]) / np.maximum(size, 1), centres)
        moved = np.maximum.accumulate(moved)  # rounding must not unsort
        if np.array_equal(moved, centres):
            break
        centres = moved
    codebook = centres.astype(np.float32)
    groups = np.searchsorted(between(codebook.astype(np.float64)), x, side="right")
    return codebook, groups.astype(np.uint32)


def between(centres: Floats) -> Floats:
    """The m - 1 points from which on the next centre is nearer."""
    return (centres[1:] + centres[:-1]) / 2.0


def means(x: Floats, groups: Groups, empty: Vector) -> Vector:
    """Mean of the values of each group, (m,); ``empty`` holds the value of a group without any."""
    size = np.bincount(groups, minlength=empty.size)
    total = np.bincount(groups, x, minlength=empty.size)
    return np.where(size > 0, total / np.maximum(size, 1), empty).astype(np.float32)
