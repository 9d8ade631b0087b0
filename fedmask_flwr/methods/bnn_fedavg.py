"""BNN-FedAvg: a binary network, of which clients send the signs of its weights and the server their mean.

Binary weights by latent real ones: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio, "Binarized Neural Networks",
NeurIPS 2016, arXiv 1602.02830; here only weights are binary, activations are not. The federated form is the
baseline that papers on masks compare with.

Travels: up, a sign a weight, at most 1 bit; down, the counts of plus signs, at most log2(K + 1) bits a weight.
Every other float (biases, norms, weights that ``exclude`` leaves out) is dense, 32 bits each way. Nothing down
before round 1.

Settings: a weight is +-c, c the mean magnitude of its layer's initial weights: e/sqrt(fan_in) on a seeded
network. Latent weights begin each round at the mean sign, or without a majority (so in round 1) at a uniform of
[0, 1] with the initial sign, and stay in [-1, 1]; the gradient passes the sign as it is. ``learning-rate`` (0.1,
Adam) is theirs; all else trains with 1e-3.

Limits: a latent weight that all clients agree on begins at +-1 and must cross 0 within one round to change its
sign: about 1 / ``learning-rate`` steps of Adam, or the network freezes. Signs count alike, whatever the
number of examples; only the dense rest is weighted by it. Flips of a lossy codec are not undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, final, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import VoteCounter
from fedmask_flwr.masks import MaskSpec, Mode, derive, frozen_weights, words
from fedmask_flwr.masks.lean import SGD, Adam
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack_bits

from .base import Fields, Memory, Method, MethodConfig, Training, Turn, Update, View
from .dense import LEARNING_RATE as REST_LEARNING_RATE
from .dense import Vector, float_entries, read_tensors, write_tensors
from .fedavg import weighted_mean
from .layers import plain

LEARNING_RATE = 0.1


@dataclass(frozen=True, slots=True)
class SignState:
    """Plus signs (d,) among ``total`` clients of the last round, and the dense rest; 0 before the first."""

    plus: npt.NDArray[np.uint32]
    total: int
    rest: Vector


@final
class BnnFedAvg(Method[SignState]):
    """See the module's card."""

    name: ClassVar[str] = "bnn-fedavg"
    State = SignState
    Config: ClassVar[type[MethodConfig]] = MethodConfig
    modes: ClassVar[tuple[Mode, ...]] = ("expected",)

    def __init__(
        self, spec: MaskSpec, model: nn.Module, config: MethodConfig | None = None, *, fraction: float = 1.0
    ) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        first = dict(zip(map(id, spec.params(model)), spec.names, strict=True))
        shared = model.named_parameters(remove_duplicate=False)  # a tied weight has several names
        self._binary = {plain(name): first[id(p)] for name, p in shared if id(p) in first}
        self.order = [(plain(name), t.numel()) for name, t in float_entries(model)]
        self.start = read_tensors(self._rest(model))
        w = frozen_weights(model, spec).cpu()
        self._signs = (w >= 0.0).numpy()
        self.scale = [float(part.double().abs().mean()) for part in spec.split_weights(w).values()]
        if 0.0 in self.scale:
            name = spec.names[self.scale.index(0.0)]
            raise ValueError(f"the initial weights of {name!r} are all 0, which says no scale: exclude it")

    def _rest(self, model: nn.Module) -> Iterator[Tensor]:
        """The floats that are not binary, in the order of their names."""
        return (t for name, t in float_entries(model) if plain(name) not in self._binary)

    @property
    def numel(self) -> int:
        """Every float of the model's state dict."""
        return self.floats

    def down(self, shared: Memory) -> Fields:
        """Counts of plus signs, and the rest if there is any."""
        return {"plus": ("counts", self.spec.numel), **self._dense()}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Signs, and the rest if there is any."""
        return ({"signs": ("bits", self.spec.numel), **self._dense()},)

    def _dense(self) -> Fields:
        return {"rest": ("dense", self.start.size)} if self.start.size else {}

    def known(self, got: Payload, turn: Turn, shared: Memory) -> SideInfo:
        """Nothing but the layer sizes: the signs are coded themselves."""
        return SideInfo(self.spec.sizes)

    def mean(self, got: Payload) -> Vector:
        """Mean sign of each binary weight, (d,) in [-1, 1]; 0 without a majority."""
        if "plus" not in got.counts:
            return np.zeros(self.spec.numel, np.float32)
        plus, top = got.counts["plus"].values, got.counts["plus"].top
        if top < 1:
            raise WireError(f"broadcast of {top} votes: not a state of {self.name}")
        return ((2.0 * plus - top) / top).astype(np.float32)

    def signs(self, got: Payload) -> npt.NDArray[np.bool_]:
        """The majority's sign (d,), True for plus; the initial one without a majority."""
        mean = self.mean(got)
        return np.where(mean == 0.0, self._signs, mean > 0.0)

    def latent(self, got: Payload, turn: Turn) -> Vector:
        """Latent weights (d,) to begin with: the mean sign, or a keyed uniform with the initial sign."""
        mean = self.mean(got)
        uniform = (words(derive(turn.seed, "latent"), mean.size) + (2.0**31 + 0.5)) / 2.0**32
        return np.where(mean == 0.0, np.where(self._signs, uniform, -uniform), mean).astype(np.float32)

    def weights(self, got: Payload) -> Vector:
        """The binary network of the mean signs: every float of the state dict, in the order of its names."""
        layers = np.split(self.signs(got), np.cumsum(self.spec.sizes)[:-1])
        binary = {
            name: np.where(signs, c, -c).astype(np.float32)
            for name, signs, c in zip(self.spec.names, layers, self.scale, strict=True)
        }
        rest, at, parts = got.dense.get("rest", self.start), 0, []
        for name, numel in self.order:
            if name in self._binary:
                parts.append(binary[self._binary[name]])
            else:
                parts.append(rest[at : at + numel])
                at += numel
        return np.concatenate(parts)

    def init(self) -> SignState:
        """Nothing learned: clients start from the signs of the initial weights."""
        return SignState(np.zeros(0, np.uint32), 0, np.zeros(0, np.float32))

    def broadcast(self, state: SignState, client: int | None = None) -> Payload:
        """Integer counts and the rest; nothing before the first round."""
        if state.total == 0:
            return Payload()
        rest = {"rest": state.rest} if state.rest.size else {}
        return Payload(counts={"plus": Counts(state.plus, state.total)}, dense=rest)

    def aggregate(self, state: SignState, updates: Iterable[Update]) -> SignState:
        """Count plus signs; sum_k n_k x_k / sum_k n_k of the rest."""
        votes = VoteCounter(self.spec.numel)

        def counted() -> Iterator[tuple[float, Vector]]:
            for update in updates:
                votes.add(update.payload.bits["signs"])
                yield update.weight, update.payload.dense.get("rest", self.start)
                del update  # before the next is decoded

        rest = weighted_mean(counted())
        return state if rest is None else SignState(votes.votes(), votes.masks, rest)

    def result(self, state: SignState) -> Payload:
        """The binary network, as the floats it stands for."""
        return Payload(dense={"weights": self.weights(self.broadcast(state))})

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the binary network of the mean signs."""
        write_tensors((t for _, t in float_entries(model)), self.weights(got))

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Latent weights from the mean signs, a fresh optimiser each round."""
        write_tensors((t for _, t in float_entries(model)), self.weights(got))
        return self._optimizer(got, model, training, turn)

    def _optimizer(self, got: Payload, model: nn.Module, training: Training, turn: Turn) -> Optimizer:
        binary = self.spec.params(model)
        covered = set(map(id, binary))
        rest = [p for p in model.parameters() if id(p) not in covered]
        for p in model.parameters():
            p.requires_grad_(True)
        lr = LEARNING_RATE if training.lr is None else training.lr
        groups = [{"params": binary, "lr": lr}, {"params": rest, "lr": REST_LEARNING_RATE}]
        outer = Adam(groups, lr) if training.optimizer == "adam" else SGD(groups, lr)
        latents = self.spec.split_weights(torch.from_numpy(self.latent(got, turn))).values()
        pairs = zip(binary, latents, self.scale, strict=True)
        return SignOptimizer(outer, [(p, latent.to(p.device), c) for p, latent, c in pairs])

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """The signs of the latent weights, and the rest as it is."""
        if not isinstance(optimizer, SignOptimizer):
            raise TypeError(f"train with the optimiser that the turn handed out, not {type(optimizer).__name__}")
        rest = {"rest": read_tensors(self._rest(model))} if self.start.size else {}
        return Payload(bits={"signs": pack_bits(optimizer.signs())}, dense=rest)

    def adapt(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """The same training, of the installed network."""
        return self._optimizer(got, model, training, turn)

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """A bit a binary weight, 32 every other float; the scales come with the seed."""
        return {"model_bits": float(self.spec.numel + 32 * self.start.size)}


@final
class SignOptimizer(Optimizer):
    """Moves latent weights by ``outer`` with the gradients of the binary ones, which stay in the model.

    ``layers`` holds, a layer, the parameter, its latent weights of the same shape in [-1, 1], and c: the parameter
    is set to c where the latent weight is not negative, else to -c.
    """

    def __init__(self, outer: Optimizer, layers: list[tuple[nn.Parameter, Tensor, float]]) -> None:
        super().__init__(outer.param_groups, {})
        self.param_groups = outer.param_groups  # the same, so that a scheduler of the user's loop reaches it
        self._outer, self._layers = outer, layers

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move the latent weights, clip them, and write their signs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for p, latent, _ in self._layers:
            p.copy_(latent)
        self._outer.step()
        for p, latent, c in self._layers:
            latent.copy_(p.clamp_(-1.0, 1.0))
            p.copy_(torch.where(latent >= 0.0, c, -c))
        return loss

    def signs(self) -> npt.NDArray[np.bool_]:
        """Where the latent weight is not negative, (d,).

        Raises
        ------
        ValueError
            A latent weight is NaN.
        """
        flat = torch.cat([latent.reshape(-1) for _, latent, _ in self._layers]).cpu()
        if bool(flat.isnan().any()):
            raise ValueError("a latent weight is NaN: check the training (learning rate, loss, data)")
        return (flat >= 0.0).numpy()
