"""Optimisers that train a mask: the model stays an ordinary network whose weights are w*m.

The straight-through gradient needs nothing from autograd but G = dL/d(w*m), which every dense backward pass leaves
in ``p.grad``: dL/ds = G*w*theta*(1-theta). So the forward and backward pass are plain PyTorch, and one elementwise
step turns G into a score update and draws the next mask, or thresholds it: the formula is then a sigmoid surrogate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from math import isfinite, log
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn

from . import fused
from .apply import frozen_weights
from .backbone import freeze
from .draw import Draw, DrawRule, check_scores, check_theta, pruned_off
from .kernels import Room, native, score_gradient_, single, slice_length, slices
from .keyed import Key, derive
from .pieces import Layers, finite
from .spec import MaskSpec
from .tiled import StepKeys

Ste = Literal["identity", "p"]


class MaskOptimizer(torch.optim.Optimizer, ABC):
    """Trains scores s of a mask over the frozen weights of `model`; theta = sigmoid(s).

    Construction takes the frozen w from the model's present weights, freezes all other parameters
    (`freeze`), draws the first mask and writes w*m into the model. From then on, train as usual.

    Parameters
    ----------
    model
        Any module. Its parameter objects are kept, so compiled models and AMP work unchanged.
    spec
        What is masked; default ``MaskSpec.of(model)``.
    lr
        Step size on the scores; they must travel about +-4, so it is larger than for weights.
    theta
        Initial probabilities, one number or (d,).
    key
        Names the random streams: step t draws its mask under ``derive(*key, "step", t)``. Give
        ``derive(seed, "train", round, client)``. An int n stands for ``derive(n)``.
    ste
        ``"identity"``: dL/ds = G*w*theta*(1-theta). ``"p"``: times theta again, as FedPM's code does.
    clip
        theta stays in [clip, 1-clip], so that no score becomes infinite and no gradient dies.
    sparsity
        lambda >= 0 of a penalty lambda * mean(theta) added to the loss.
    frozen
        w (spec.weights,), for a model whose weights already carry a mask.
    draw
        ``"bernoulli"``: each mask is a sample of theta. ``"threshold"``: it is 1[theta >= tau], decided as
        s >= logit(tau) in float32 (s >= 0 for tau = 1/2), so that equal scores give equal bits on every machine.
    tau
        Threshold on theta, between `clip` and 1 - `clip`; only ``draw="threshold"`` uses it.
    support
        (d,) bool; the other positions are pruned: bit and theta are 0, score and moments never move.

    Raises
    ------
    ValueError
        A setting is out of range, the spec has units, or the model does not fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: MaskSpec | None = None,
        *,
        lr: float = 0.1,
        theta: float | Tensor = 0.5,
        key: Key | int = 0,
        ste: Ste = "identity",
        clip: float = 1e-4,
        sparsity: float = 0.0,
        frozen: Tensor | None = None,
        draw: Draw = "bernoulli",
        tau: float = 0.5,
        support: Tensor | None = None,
        **defaults: Any,
    ) -> None:
        spec = MaskSpec.of(model) if spec is None else spec
        if spec.units:
            raise ValueError("filters that share a bit are voted on, not trained: give a spec without units")
        if ste not in get_args(Ste):
            raise ValueError(f"ste must be 'identity' or 'p', not {ste!r}")
        if not 1e-7 <= clip < 0.5:
            raise ValueError(f"clip must lie in [1e-7, 0.5), got {clip}")
        if not (isfinite(lr) and lr >= 0 and isfinite(sparsity) and sparsity >= 0):
            raise ValueError(f"lr and sparsity must be finite and not negative, got {lr} and {sparsity}")
        if draw == "threshold" and not clip < tau < 1 - clip:
            raise ValueError(f"tau must lie between clip and 1 - clip, or no bit can change; got {tau} and {clip}")
        params = spec.params(model)
        rule = DrawRule(draw, tau, pruned_off(support, spec.numel, params[0].device))
        current = frozen_weights(model, spec)
        if frozen is not None:
            if frozen.shape != current.shape:
                raise ValueError(f"frozen must hold {spec.weights} weights, got shape {tuple(frozen.shape)}")
            current = current.copy_(frozen)
        freeze(model, spec)
        super().__init__([{"params": params, "lr": lr}], {"lr": lr, **defaults})
        self._spec, self._rule = spec, rule
        self._key, self._updates = derive(key) if isinstance(key, int) else key, 0
        self._ste, self._penalty, self._bound = ste, sparsity / spec.numel, single(log((1 - clip) / clip))
        d, device = spec.numel, current.device
        self._scores = torch.empty(d, device=device)
        self._moments = {name: torch.zeros(d, device=device) for name in self._moment_names()}
        # Gradient on the way in, mask values on the way out, a slice at a time: a device pays for no third moment.
        n = slice_length(d, device)
        self._layers = Layers(spec, params, current)
        self._work = torch.empty(self._layers.room(n), device=device)
        self._scratch: Tensor | None = None
        self._room: Room | None = None
        self._fused: fused.Step | None = None
        self._keys = StepKeys()
        self.set_theta(theta)

    @property
    def spec(self) -> MaskSpec:
        """What is masked."""
        return self._spec

    @property
    def frozen(self) -> Tensor:
        """The frozen weights w, (spec.weights,) float32; a copy."""
        return self._layers.frozen.flat()

    @property
    def scores(self) -> Tensor:
        """The scores s, (d,) float32; not a copy."""
        return self._scores

    @property
    def support(self) -> Tensor:
        """Positions that are not pruned, (d,) bool; a copy."""
        pruned = self._rule.pruned
        return torch.ones_like(self._scores, dtype=torch.bool) if pruned is None else ~pruned

    @property
    def updates(self) -> int:
        """Number of updates so far; also the number of the step whose mask is in the model."""
        return self._updates

    def theta(self) -> Tensor:
        """Keep-probabilities sigmoid(s), 0 off the support: (d,) float32."""
        return self._rule.theta(self._scores)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Draw the mask that is in the model now again, from its scores and key: (d,) bool."""
        out = torch.empty_like(self._scores)
        self._rule.write_(self._scores, self._step_key(), out)
        return out.bool()

    @torch.no_grad()
    def set_theta(self, theta: float | Tensor) -> None:
        """Set the probabilities (one number or (d,)) and write their mask; moments stay.

        Raises
        ------
        ValueError
            The wrong number of probabilities, or one outside [0, 1].
        """
        p = check_theta(theta, self._spec.numel)
        for part in slices(self._spec.numel, self._scores.device):
            s = torch.logit((p[part] if p.ndim else p).to(self._scores.device, torch.float64))
            self._scores[part] = s.clamp_(-self._bound, self._bound)
        self._write_mask()

    @torch.no_grad()
    def set_scores(self, scores: Tensor) -> None:
        """Set s, (d,) float32, and write its mask; moments stay.

        Scores that an optimiser with this `clip` had come back bit for bit, others are clamped to its range.

        Raises
        ------
        ValueError
            The wrong shape or type, or a NaN.
        """
        check_scores(scores, self._spec.numel)
        self._scores.copy_(scores).clamp_(-self._bound, self._bound)
        self._write_mask()

    @torch.no_grad()
    def restore(self) -> None:
        """Write the frozen w back into the model, unmasked."""
        self._layers.restore()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: one mask is one vector with one step size."""
        if self.param_groups:
            raise ValueError("a mask optimiser has one group; train other parameters with one of their own")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the scores from the gradients in the model and write the next mask.

        A parameter without a gradient counts as one with gradient zero.

        Raises
        ------
        ValueError
            A gradient is NaN or infinite; the message names the layer. Nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        power = self._ste == "p"
        if self._fused is None and fused.usable(self._layers):
            self._fused = fused.Step(self._layers, self._scores, list(self._moments.values()), self._rule)
        if self._fused is not None:
            flat = self._fused.gradients()
            if not self._fused.finite(flat):
                self._refuse(self._layers.gradients())
            self._updates += 1
            self._fused(
                flat, self._step_key(),
                rates=self._rates(self.param_groups[0]), bound=self._bound, power=power, penalty=self._penalty,
            )  # fmt: skip
        else:
            grads = self._layers.gradients()
            if not (self._layers.on_cpu and not self._layers.whole and finite(self._layers, grads)):
                self._refuse(grads)
            self._updates += 1
            learners = self._learners(grads, self._rates(self.param_groups[0]), power)
            self._layers.write(self._masks(self._step_key(), learners))
        return loss

    def _learners(self, grads: list[Tensor | None], rates: tuple[float, ...], power: bool) -> Iterator[None]:
        """Update scores and moments, a slice at a time: one for each mask that `_masks` yields."""
        moments = [native(m) for m in self._moments.values()]
        if self._scratch is None:
            n = slice_length(self._spec.numel, self._scores.device)
            self._scratch = torch.empty(4, n, device=self._scores.device)
        s, scratch = native(self._scores), native(self._scratch)
        pruned = self._rule.pruned
        for part in slices(self._spec.numel, self._scores.device):
            g, n = native(self._layers.incoming(grads, part, self._work)), part.stop - part.start
            with np.errstate(all="ignore"):  # a large gradient is none of our business while it is finite
                score_gradient_(g, s[part], scratch[:, :n], power=power, penalty=self._penalty)
                if pruned is not None:
                    # From zero gradients, both updates leave scores and zero moments as they are, to the bit.
                    g[native(pruned[part])] = 0.0
                self._update(s[part], g, [m[part] for m in moments], scratch[0, :n], rates)
            _clip(s[part], self._bound)
            yield

    def _refuse(self, grads: list[Tensor | None]) -> None:
        """Find the layer whose gradient is not finite, if there is one: what is cheap could not rule it out."""
        parts = slices(self._spec.numel, self._scores.device)
        total = sum(float(self._layers.incoming(grads, part, self._work).sum()) for part in parts)
        if not isfinite(total) and (name := self._layers.bad(grads)) is not None:
            raise ValueError(
                f"the gradient of {name!r} holds NaN or infinity: lower the step size or the loss "
                "scale, clip the gradients, or check the data"
            )

    def _step_key(self) -> Key:
        return self._keys.of(self._key, self._updates)

    def _write_mask(self) -> None:
        self._layers.write(self._masks(self._step_key()))

    def _masks(self, key: Key, learners: Iterator[None] | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the mask and their values, each after its learner, while its scores are in the cache.

        At filter granularity it is one slice after all learners: filters are few, and `_work` holds all of them.
        """
        n, room = len(self._work), self._room
        if room is None and self._scores.device.type == "cpu":
            room = Room(slice_length(n, self._scores.device))
            if not fused.usable(self._layers):  # whose steps have no use for it
                self._room = room
        for start in range(0, self._spec.numel, n):
            part = slice(start, min(start + n, self._spec.numel))
            if learners is not None:
                deque(learners, 0) if self._layers.whole else next(learners)
            values = self._work[: part.stop - part.start]
            self._rule.write_(self._scores[part], key, values, start, room)
            yield part, values

    def state_dict(self) -> dict[str, Any]:
        """Scores, moments, step count, key and settings; copies. The frozen weights are not in it."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        return {
            "spec": self._spec.digest,
            "rule": self._rule.state(),
            "key": tuple(self._key),
            "step": self._updates,
            "scores": self._scores.clone(),
            "moments": {name: m.clone() for name, m in self._moments.items()},
            "param_groups": groups,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` was made, bit for bit, and write that step's mask.

        Raises
        ------
        ValueError
            It belongs to another mask, `draw`, `tau` or support, or to another kind of optimiser.
        """
        if state_dict["spec"] != self._spec.digest:
            raise ValueError("the optimiser state belongs to another mask: build the same model and MaskSpec")
        if set(state_dict["moments"]) != set(self._moments):
            raise ValueError("the optimiser state belongs to another kind of optimiser or momentum setting")
        self._rule.check_state(state_dict.get("rule", DrawRule().state()))
        self._key, self._updates = Key(*state_dict["key"]), int(state_dict["step"])
        self._scores.copy_(state_dict["scores"])
        for name, m in self._moments.items():
            m.copy_(state_dict["moments"][name])
        self.param_groups[0].update(state_dict["param_groups"][0])
        self._write_mask()

    @abstractmethod
    def _moment_names(self) -> tuple[str, ...]:
        """Names of the vectors (d,) that the update carries from step to step."""

    @abstractmethod
    def _rates(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Numbers of this update, each rounded to float32."""

    @abstractmethod
    def _update(self, s: Any, g: Any, moments: list[Any], scratch: Any, rates: tuple[float, ...]) -> None:
        """Update one slice of scores in place from the gradient dL/ds in `g`; numpy on a CPU, else torch."""


def _clip(s: Any, bound: float) -> None:
    if isinstance(s, Tensor):
        s.clamp_(-bound, bound)
    else:
        np.clip(s, np.float32(-bound), np.float32(bound), out=s)
