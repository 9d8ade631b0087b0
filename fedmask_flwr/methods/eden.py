"""EDEN at one bit: rotate the update at random, send the signs and one scale, rotate back.

Paper: Vargaftik, Ben Basat, Portnoy, Mendelson, Ben-Itzhak, Mitzenmacher, "EDEN: Communication-Efficient and
Robust Distributed Mean Estimation for Federated Learning", ICML 2022, arXiv 2108.08842.

R = H D: D keyed random signs, H the Walsh-Hadamard matrix over sqrt(B). Q takes each coordinate to the nearer of
the 1-bit Lloyd-Max centroids +-sqrt(2/pi); the server reads S R^-1 Q(R x) with S = ||x||^2 / <R x, Q(R x)>. At one
bit the centroid cancels: the signs and ||x||^2 / ||R x||_1 travel.

The vector is cut into even parts of at most B values, each padded with zeros to B, a power of two of 2^9..2^16 such
that the fewest bits travel; each part has its own scale.

Travels: up, 1 bit a parameter, padding (less than B bits) and 32 bits a part: 1.01 for a million parameters. Down,
32 bits a parameter.

Settings: none of its own; the rest as FedAvg.

Limits: unbiased over uniform rotations; one Hadamard rotation is close to that for updates spread over many
coordinates, not for a part with a handful of nonzero values. The squared error is about pi/2 - 1 = 0.57 ||x||^2 a
client, averaged over clients. The rotation's key travels with the reply: a client may pick it, as it may pick its
update.
"""

from __future__ import annotations

from typing import ClassVar, final

import numpy as np
import numpy.typing as npt
from torch import nn

from fedmask_flwr.masks import Key, MaskSpec, derive, words
from fedmask_flwr.wire import Payload, SideInfo, WireError, pack_bits, unpack_bits

from .base import Fields, Known, Memory, MethodConfig, Turn, Update
from .compressed import Compressed, Floats
from .dense import DenseState


@final
class Eden(Compressed):
    """See the module's card; a padded vector has shape (parts, B)."""

    name: ClassVar[str] = "eden"

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.shape = parts(self.d)
        edges = np.arange(self.shape[0] + 1) * self.d // self.shape[0]
        self._shift = np.repeat(np.arange(self.shape[0]) * self.shape[1] - edges[:-1], np.diff(edges))

    @property
    def at(self) -> npt.NDArray[np.int64]:
        """Where in the padded vector each value lies, (d,)."""
        return self._shift + np.arange(self.d)

    def code(self) -> Fields:
        """Signs of the rotated parts and their scales."""
        return {"signs": ("bits", self.shape[0] * self.shape[1]), "scale": ("dense", self.shape[0])}

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """Random bits: one layer."""
        return {"signs": SideInfo((self.shape[0] * self.shape[1],))}

    def encode(self, got: Payload, delta: Floats, turn: Turn, memory: Memory) -> Payload:
        """Signs of R x, and ||x||^2 / ||R x||_1."""
        key = derive(turn.seed, "eden", turn.round, turn.client)
        x = np.zeros(self.shape)
        x.reshape(-1)[self.at] = delta
        square = (x * x).sum(axis=1)
        x *= flips(key, self.shape)
        hadamard(x)
        length = np.abs(x).sum(axis=1)
        scale = square / np.where(length > 0.0, length, 1.0)
        return Payload(
            bits={"signs": pack_bits(x.reshape(-1) >= 0.0)},
            dense={"scale": scale.astype(np.float32)},
            meta={"k0": key.k0, "k1": key.k1},
        )

    def decode(self, got: Payload, payload: Payload) -> Floats:
        """S R^-1 Q(R x)."""
        ups = unpack_bits(payload.bits["signs"], self.shape[0] * self.shape[1]).reshape(self.shape)
        x = np.where(ups, 1.0, -1.0) * payload.dense["scale"].astype(np.float64)[:, None]
        hadamard(x)
        x *= flips(Key(int(payload.meta["k0"]), int(payload.meta["k1"])), self.shape)
        found: Floats = x.reshape(-1)[self.at]
        return found

    def check(self, state: DenseState, update: Update) -> None:
        """Refuse a reply without the key of its rotation, and scales below 0."""
        super().check(state, update)
        for name in ("k0", "k1"):
            value = update.payload.meta.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or not -(2**31) <= value < 2**31:
                raise WireError(f"{name} = {value!r} is no half of a rotation's key")
        if (update.payload.dense["scale"] < 0).any():
            raise WireError("a scale is below 0")


def parts(d: int) -> tuple[int, int]:
    """Number of parts and their padded length B with the fewest bits for d values."""
    if d <= 512:
        return 1, 1 << max(d - 1, 0).bit_length()
    shapes = [(-(-d // (1 << b)), 1 << b) for b in range(9, 17)]
    return min(shapes, key=lambda shape: shape[0] * (shape[1] + 32))


def flips(key: Key, shape: tuple[int, int]) -> Floats:
    """The keyed diagonal D of +1 and -1."""
    return np.where(words(key, shape[0] * shape[1]) < 0, -1.0, 1.0).reshape(shape)


def hadamard(x: Floats) -> None:
    """Multiply each row, B long, by the Walsh-Hadamard matrix over sqrt(B), in place; it is its own inverse.

    Only sums and differences in a fixed order: the same bits on every machine.
    """
    rows, length = x.shape
    step = 1
    while step < length:
        pairs = x.reshape(rows, length // (2 * step), 2, step)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        first += second  # a + b
        second *= -2.0
        second += first  # (a + b) - 2b
        step *= 2
    x *= length**-0.5
