"""FedMask: each device keeps a mask of its own, and shares only the bits that other devices train too.

Paper: Li, Sun, Zeng, Zhang, Li, Chen, "FedMask: Joint Computation and Communication-Efficient Personalized
Federated Learning via Heterogeneous Masking", SenSys 2021, doi 10.1145/3485730.3485929.

A device's first turn trains real-valued masks m_r = sigmoid(s) of all weights, then keeps the share 1 - ``prune``
with the largest |w| * m_r of the last layers: its private support S_k. From then on only S_k trains, through
the deterministic mask 1[m_r >= tau] with the sigmoid's derivative in the backward pass. The server averages every
position over the devices of the round that own it, where there are at least two, leaves the others untouched, and
sends each device its own vector.

Travels: up, the bits on S_k, coded against what the device was told: below 1 bit a parameter (in a device's first
turn the support too, at most 1.6). Down, the means on S_k in steps of 1/60 (``returns = "mean"``), at most 6 bits,
or the bits alone (``returns = "bit"``), at most 1; nothing before a device's first reply. No device is told
anything of a position that it does not own. A mean lets it guess how many others own one, a bit does not.

Settings: Adam 0.1 on the scores, fresh each round, tau 0.5; prune 0.2 of the last 2 layers, by weight or whole
neurons (``prune-by = "neuron"``; the outputs of the last layer stay). For ``adapt-epochs``
(2) a device fine-tunes its active weights before it evaluates, as the paper does at the end.

Limits: the paper's sparsity loss is not public, ``sparsity`` (lambda * mean(m_r)) stands in for it. A tie keeps the
device's own bit. With ``returns = "bit"`` a lost reply, or a lossy codec, sets bits back that nobody else owns.
The server keeps a vector a device, for good, and no network of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import log
from typing import Any, ClassVar, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import OverlapMean
from fedmask_flwr.masks import (
    MaskAdam,
    MaskOptimizer,
    MaskSGD,
    MaskSpec,
    Mode,
    derive,
    freeze,
    frozen_weights,
    words,
    write_mask,
)
from fedmask_flwr.masks.lean import Adam
from fedmask_flwr.wire import Bits, Counts, Payload, Scalar, SideInfo, WireError, pack_bits, popcount, unpack_bits

from .base import Fields, Memory, Method, MethodConfig, Training, Turn, Update, View
from .dense import hold_zeros

LEARNING_RATE = 0.1
LEVELS = 60  # steps of a mean: exact for up to 6 owners
KEPT, ONE = 1, 2  # a position in a first reply: 0 is pruned; coded exactly, whatever codec the bits are in
CERTAIN = 0.01  # a mean is clipped to [0.01, 0.99] before it becomes a score
Flags = npt.NDArray[np.bool_]
Row: TypeAlias = tuple[Bits, npt.NDArray[np.uint8]]
"""Support and means of a device."""


class FedMaskConfig(MethodConfig):
    """How a device prunes, thresholds and what it is told."""

    tau: float = Field(0.5, gt=0.01, lt=0.99, description="threshold on m_r = sigmoid(s)")
    prune: float = Field(0.2, ge=0.0, lt=1.0, description="share pruned of each of the last layers")
    prune_layers: int = Field(2, ge=0, description="number of last layers that are pruned")
    prune_by: Literal["weight", "neuron"] = "weight"
    returns: Literal["mean", "bit"] = Field("mean", description="what the server sends a device of its positions")
    theta0: float = Field(0.5, gt=0.0, lt=1.0)
    score_scale: float = Field(1.0, gt=0.0, description="spread of the first scores around the threshold")
    adam_eps: float = Field(1e-5, gt=0.0, description="Adam's epsilon")
    sparsity: float = Field(0.0, ge=0.0, description="lambda of the penalty lambda * mean(m_r)")
    tune_lr: float = Field(3e-3, gt=0.0, description="Adam's step when the active weights are fine-tuned")


@dataclass(frozen=True, slots=True)
class FedMaskState:
    """A row a device, by its number: support S_k (packed bits) and mean on it, 0..60 (0 off the support)."""

    clients: npt.NDArray[np.uint64]
    supports: npt.NDArray[np.uint8]
    means: npt.NDArray[np.uint8]


@final
class FedMask(Method[FedMaskState]):
    """See the module's card."""

    name: ClassVar[str] = "fedmask"
    State = FedMaskState
    Config = FedMaskConfig
    personal = True
    modes: ClassVar[tuple[Mode, ...]] = ()
    adapt_epochs: ClassVar[int] = 2

    @property
    def numel(self) -> int:
        """d, the number of mask bits."""
        return self.spec.numel

    # What travels

    def down(self, shared: Memory) -> Fields:
        """A value a position of the device's support."""
        if "support" not in shared:
            return {}
        n = popcount(shared["support"])
        return {"mean": ("counts", n)} if self.config.returns == "mean" else {"bit": ("bits", n)}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """The bits on the support that both know; or support and mask, when they do not agree on one."""
        first: Fields = {"first": ("counts", self.numel)}
        if not agreed(got, shared):
            return (first,)
        return ({"mask": ("bits", popcount(shared["support"]))}, first)

    def heard(self, shared: Memory) -> SideInfo:
        """The layers of the support."""
        return SideInfo(self.sizes(shared["support"]) if "support" in shared else self.spec.sizes)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Mapping[str, SideInfo]:
        """The support's layers, and as reference the vector that the device was told."""
        named = {"first": SideInfo(self.spec.sizes)}
        if agreed(got, shared):
            named["mask"] = SideInfo(self.sizes(shared["support"]), pack_bits(2 * self.told(got, shared) >= LEVELS))
        return named

    def sizes(self, support: Bits) -> tuple[int, ...]:
        """Number of positions of each layer that the support holds."""
        flags, stops = unpack_bits(support, self.numel), np.cumsum(self.spec.sizes)
        return tuple(int(layer.sum()) for layer in np.split(flags, stops[:-1]))

    def told(self, got: Payload, shared: Memory) -> npt.NDArray[np.int64]:
        """The broadcast means on the support, in steps of 1/60."""
        if self.config.returns == "bit":
            return unpack_bits(got.bits["bit"], popcount(shared["support"])).astype(np.int64) * LEVELS
        counts = got.counts["mean"]
        if counts.top != LEVELS:
            raise WireError(f"means in steps of 1/{counts.top}, expected 1/{LEVELS}")
        return counts.values.astype(np.int64)

    def in_step(self, meta: Mapping[str, Scalar], memory: Memory) -> bool:
        """The device holds the support that the server thinks it does."""
        return "support" not in meta or meta["support"] == digest_of(memory.get("support"))

    # Server

    def init(self) -> FedMaskState:
        """No device yet."""
        d = self.numel
        none = np.zeros(0, np.uint64)
        return FedMaskState(none, np.zeros((0, -(-d // 8)), np.uint8), np.zeros((0, d), np.uint8))

    def recall(self, state: FedMaskState, client: int) -> Memory:
        """The device's support."""
        row = row_of(state, client)
        return {} if row is None else {"support": state.supports[row]}

    def broadcast(self, state: FedMaskState, client: int | None = None) -> Payload:
        """The device's own vector."""
        row = None if client is None else row_of(state, client)
        if row is None:
            return Payload()
        support = state.supports[row]
        means = state.means[row][unpack_bits(support, self.numel)]
        meta = {"support": digest_of(support)}
        if self.config.returns == "bit":
            return Payload(bits={"bit": pack_bits(2 * means >= LEVELS)}, meta=meta)
        return Payload(counts={"mean": Counts(means.astype(np.uint32), LEVELS)}, meta=meta)

    def check(self, state: FedMaskState, update: Update) -> None:
        """A position of a first reply is pruned, kept and 0, or kept and 1."""
        first = update.payload.counts.get("first")
        if first is not None and first.top != ONE:
            raise WireError(f"a first reply counts to {first.top}, expected {ONE}")

    def aggregate(self, state: FedMaskState, updates: Iterable[Update]) -> FedMaskState:
        """Mean over the owners of a position, where there are two or more; each device's row is its own."""
        rows: dict[int, Row] = {
            int(k): (s, m) for k, s, m in zip(state.clients, state.supports, state.means, strict=True)
        }
        overlap, sent = OverlapMean(self.numel), {}
        for update in updates:
            support, mask = self.reply_of(update.payload, rows.get(update.client))
            overlap.add(support, mask)
            sent[update.client] = support, mask
        if not sent:
            return state
        means, shared = overlap.means(LEVELS)
        for client, (support, mask) in sent.items():
            own = unpack_bits(mask, self.numel)
            vector = np.where(shared, means, own * LEVELS)
            if self.config.returns == "bit":  # a tie keeps the device's own bit
                vector = np.where(2 * vector == LEVELS, own * LEVELS, vector)
            rows[client] = support, (vector * unpack_bits(support, self.numel)).astype(np.uint8)
        order = sorted(rows)
        return FedMaskState(
            np.array(order, np.uint64), np.stack([rows[k][0] for k in order]), np.stack([rows[k][1] for k in order])
        )

    def reply_of(self, payload: Payload, row: Row | None) -> tuple[Bits, Bits]:
        """Support and mask (packed, d bits each) of a reply; ``row`` is what the server has of the device."""
        if row is None or "first" in payload.counts:
            first = payload.counts["first"].values
            return pack_bits(first >= KEPT), pack_bits(first == ONE)
        mask = unpack_bits(row[0], self.numel)
        mask[mask] = unpack_bits(payload.bits["mask"], int(mask.sum()))
        return row[0], pack_bits(mask)

    def result(self, state: FedMaskState) -> Payload:
        """Majority of the owners of a position: a summary, no device's network."""
        owned = np.unpackbits(state.supports, axis=1, count=self.numel, bitorder="little").sum(0, dtype=np.int64)
        total = state.means.sum(0, dtype=np.int64)
        return Payload(bits={"mask": pack_bits((2 * total >= LEVELS * owned) & (owned > 0))})

    # Device

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """The device's own scores, moved to the means where others own a position too."""
        settings: dict[str, Any] = {
            "lr": LEARNING_RATE if training.lr is None else training.lr,
            "key": derive(turn.seed, "train", turn.round, turn.client),
            "draw": "threshold",
            "tau": self.config.tau,
            "sparsity": self.config.sparsity,
        }
        if "support" in memory:
            settings["support"] = torch.from_numpy(unpack_bits(memory["support"], self.numel))
        optimizer: MaskOptimizer
        if training.optimizer == "sgd":
            optimizer = MaskSGD(model, self.spec, **settings)
        else:
            optimizer = MaskAdam(model, self.spec, eps=self.config.adam_eps, **settings)
        scores = self.scores(got, memory) if memory else self.first_scores(turn.seed)
        optimizer.set_scores(torch.from_numpy(scores).to(optimizer.scores.device))
        return optimizer

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The thresholded mask on the support; a device without one prunes first."""
        if not isinstance(optimizer, MaskOptimizer):
            raise TypeError(f"train with the optimiser that the turn handed out, not {type(optimizer).__name__}")
        mask = optimizer.mask().cpu().numpy()
        memory["scores"] = optimizer.scores.cpu().numpy().copy()
        known = agreed(got, memory)
        if "support" not in memory:
            weights, theta = optimizer.frozen.cpu().numpy(), optimizer.theta().cpu().numpy()
            memory["support"] = pack_bits(keep_largest(np.abs(weights) * theta, self.spec, self.config))
        support = unpack_bits(memory["support"], self.numel)
        if known:
            return Payload(bits={"mask": pack_bits(mask[support])})
        first = np.where(support, np.where(mask, ONE, KEPT), 0)
        return Payload(counts={"first": Counts(first.astype(np.uint32), ONE)})

    def first_scores(self, seed: int) -> npt.NDArray[np.float32]:
        """The scores (d,) that all devices begin with: the share theta0 of them is at least logit(tau).

        logit(u) + logit(theta0) with keyed uniforms u, scaled: were all masks 1, a random network would not train.
        """
        u = (words(derive(seed, "scores"), self.numel).astype(np.float64) + 2.0**31 + 0.5) / 2.0**32
        offset = np.log(u / (1 - u)) + np.log(self.config.theta0 / (1 - self.config.theta0))
        scores: npt.NDArray[np.float32] = (self.cut + self.config.score_scale * offset).astype(np.float32)
        return scores

    @property
    def cut(self) -> np.float32:
        """logit(tau), as the optimiser has it."""
        return np.float32(log(self.config.tau / (1 - self.config.tau)))

    def scores(self, got: Payload, memory: Memory) -> npt.NDArray[np.float32]:
        """The device's scores s (d,) after it was told the means."""
        scores: npt.NDArray[np.float32] = memory["scores"].copy()
        if not agreed(got, memory):
            return scores
        support = unpack_bits(memory["support"], self.numel)
        means, own = self.told(got, memory), scores[support] >= self.cut
        mean = np.clip(means / LEVELS, CERTAIN, 1 - CERTAIN)
        # Where all owners agree with the device, or half of them, it keeps what it knows.
        keep = (2 * means == LEVELS) | (means == own * LEVELS)
        if self.config.returns == "mean":  # unanimity without the device's own bit is of a turn it has gone beyond
            keep |= (means == 0) | (means == LEVELS)
        scores[support] = np.where(keep, scores[support], self.cut + np.log(mean / (1 - mean))).astype(np.float32)
        return scores

    def bits(self, got: Payload, memory: Memory) -> Flags:
        """The device's mask 1[m_r >= tau] on its support, (d,)."""
        flags: Flags = self.scores(got, memory) >= self.cut
        return flags & unpack_bits(memory["support"], self.numel)

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the device's own network; one that never had a turn has all its weights."""
        if view.memory:
            write_mask(model, self.spec, frozen, torch.from_numpy(self.bits(got, view.memory)))

    def adapt(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Unfreeze the active weights; the others stay 0."""
        freeze(model, self.spec)
        for parameter in self.spec.params(model):
            parameter.requires_grad_(True)
        hold_zeros(model, self.spec, frozen_weights(model, self.spec) != 0)
        return Adam(self.spec.params(model), self.config.tune_lr)

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """A bit a weight is stored; ``kept`` is the support's share, ``active`` that of the ones."""
        if not memory:
            return {"model_bits": float(self.numel), "kept": 1.0, "active": 1.0}
        kept = popcount(memory["support"]) / self.numel
        return {"model_bits": float(self.numel), "kept": kept, "active": float(self.bits(got, memory).mean())}


def row_of(state: FedMaskState, client: int) -> int | None:
    """The device's row, None for one that never replied."""
    found = np.flatnonzero(state.clients == np.uint64(client))
    return int(found[0]) if found.size else None


def digest_of(support: Bits | None) -> str:
    """16 hex digits that name a support, "" for none."""
    return "" if support is None else blake2b(support.tobytes(), digest_size=8).hexdigest()


def agreed(got: Payload, shared: Memory) -> bool:
    """Say whether the server told the device a vector on the support that it has.

    A device that lost its memory was told nothing, even if it then prunes to the same support again.
    """
    told = bool(got.bits or got.counts)
    return told and "support" in shared and got.meta.get("support") == digest_of(shared["support"])


def keep_largest(importance: npt.NDArray[np.floating[Any]], spec: MaskSpec, config: FedMaskConfig) -> Flags:
    """Support (d,): all positions but the ``prune`` share with the smallest importance in each of the last layers.

    By weight, or by whole output neuron, its sum; the last layer's neurons are the classes, so it is pruned by
    weight. Ties go by position.
    """
    support, start = np.ones(spec.numel, np.bool_), 0
    last = len(spec.shapes) - 1
    for i, (shape, size) in enumerate(zip(spec.shapes, spec.sizes, strict=True)):
        if i > last - config.prune_layers:
            layer = importance[start : start + size].astype(np.float64)
            rows = shape[0] if config.prune_by == "neuron" and i < last else size
            order = np.argsort(layer.reshape(rows, -1).sum(1), kind="stable")
            flags = np.ones((rows, size // rows), np.bool_)
            flags[order[: int(config.prune * rows)]] = False
            support[start : start + size] = flags.reshape(-1)
        start += size
    return support
