"""What the methods share that compress a client's update on the uplink: Delta = w_k - w_g, d learned floats.

Parameters are coded. Statistics (running means and variances, which a lossy code would ruin) travel beside them
as floats and are averaged as FedAvg does. The downlink is dense.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import Key, MaskSpec, words
from fedmask_flwr.wire import Payload, SideInfo, WireError

from .base import Fields, Known, Memory, MethodConfig, Turn, Update
from .dense import DenseMethod, DenseState, Vector, float_entries

Floats: TypeAlias = npt.NDArray[np.float64]
LARGEST = float(np.finfo(np.float32).max)


class Compressed(DenseMethod, ABC):
    """Clients send a code of Delta, (d,); the server adds the weighted mean of what it decodes.

    ``sizes`` are the lengths of the learned tensors, d their sum; ``learned`` marks them among the n floats.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    exact: ClassVar[bool] = True
    config: Any

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        statistics = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        entries = [(t.numel(), name not in statistics) for name, t in float_entries(model) if self.travels(name)]
        self.sizes = tuple(size for size, learned in entries if learned)
        self.d = sum(self.sizes)
        self.learned = np.repeat(
            np.array([learned for _, learned in entries], np.bool_), [size for size, _ in entries]
        )
        rest = self.start.size - self.d
        self.statistics: Fields = {"statistics": ("dense", rest)} if rest else {}

    @abstractmethod
    def code(self) -> Fields:
        """Fields that an update is coded in."""

    @abstractmethod
    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """Code Delta, (d,) finite, against what was broadcast; what stays unsaid may be kept in ``memory``."""

    @abstractmethod
    def decode(self, got: Payload, payload: Payload) -> Floats:
        """Delta as the server reads it, (d,)."""

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """The code, and the statistics if the network has any."""
        return ({**self.code(), **self.statistics},)

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """The tensors' sizes: a code's own statistics are kept for each."""
        return {name: SideInfo(self.sizes) for name, (_, numel) in self.code().items() if numel == self.d}

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse lossy bits: a flipped bit is not noise here that any average would remove."""
        if update.flip_rate > 0.0:
            raise WireError(f"{self.name} needs exact bits: use an exact codec (codec = auto)")

    def aggregate(self, state: DenseState, updates: Iterable[Update]) -> DenseState:
        """w + sum_k n_k Delta_k / sum_k n_k, in float64; of the statistics the weighted mean itself."""
        got, total = self.broadcast(state), 0.0
        sums, statistics = np.zeros(self.d), np.zeros(self.start.size - self.d)
        for update in updates:
            sums += update.weight * self.decode(got, update.payload)
            if statistics.size:
                statistics += update.weight * update.payload.dense["statistics"].astype(np.float64)
            total += update.weight
            del update  # before the next one is decoded
        return self.moved(state, sums / total, statistics / total) if total else state

    def moved(self, state: DenseState, step: Floats, statistics: Floats) -> DenseState:
        """The state after a step (d,) with new statistics (n - d,), held within float32."""
        weights = self.current(state).astype(np.float64)
        weights[self.learned] += step
        weights[~self.learned] = statistics
        return DenseState(np.clip(weights, -LARGEST, LARGEST).astype(np.float32))

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """Code what training changed.

        Raises
        ------
        ValueError
            When the trained weights are not finite.
        """
        trained = self.read(model)
        return self.with_statistics(self.encode(got, self.change(got, trained), turn, memory), trained)

    def change(self, got: Payload, trained: Vector) -> Floats:
        """Delta = w_k - w_g of the learned weights, (d,)."""
        delta: Floats = trained[self.learned].astype(np.float64) - self.weights(got)[self.learned]
        if not np.isfinite(delta).all():
            raise ValueError("the trained weights hold NaN or infinity; check the training (learning rate, loss)")
        return delta

    def with_statistics(self, payload: Payload, trained: Vector) -> Payload:
        """The payload with the network's statistics beside it."""
        if not self.statistics:
            return payload
        return replace(payload, dense={**payload.dense, "statistics": trained[~self.learned]})


def uniforms(key: Key, n: int) -> Floats:
    """n keyed numbers in [0, 1), (n,), multiples of 2**-32."""
    return (words(key, n).astype(np.float64) + 2.0**31) * 2.0**-32
