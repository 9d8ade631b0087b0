"""The decomposition of FedWeIT, theta = B*sigma(m) + A + sum_n alpha_n*KB_n, trained through an ordinary network.

The chain rule needs nothing from autograd but g = dL/dtheta, which a dense backward pass leaves in ``p.grad``: the
gradients of all parts are elementwise products and sums of g over packed vectors (see `Structure`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from math import isfinite
from typing import Any, Literal, get_args, overload

import numpy as np
import torch
from torch import Tensor, nn

from .lean import SGD, Adam
from .spec import named_parameters
from .structure import Parts, Structure, compose_

Retroactive = Literal["gradient", "exact", "freeze"]
Inner = Literal["adam", "sgd"]
# What the inner optimiser carries from step to step, for each tensor that it trains.
STATE: dict[Inner, tuple[str, ...]] = {"adam": ("step", "exp_avg", "exp_avg_sq"), "sgd": ()}


@torch.no_grad()
def settle(
    structure: Structure,
    base: Tensor,
    snap_base: Tensor,
    old_masks: Tensor,
    snap_adaptive: Tensor,
    lambda1: float,
    lambda2: float,
    *,
    raw_masks: bool = False,
) -> Tensor:
    """Give the A_i of earlier tasks that minimise the loss, given B: (t, n).

    They are soft(A_snap_i - (B - B_snap)*sigma(m_i), lambda1/lambda2), which keeps B*sigma(m_i) + A_i where it was
    to within lambda1/lambda2. Without an anchor (lambda2 = 0) they stay what they were.

    Raises
    ------
    ValueError
        A penalty is negative or not finite.
    """
    _check_penalties(lambda1, lambda2)
    out = snap_adaptive.clone()
    if lambda2 == 0:
        return out
    delta, gates = base - snap_base, old_masks if raw_masks else torch.sigmoid(old_masks)
    column = structure.column.to(base.device)
    for row, gate in zip(out, gates, strict=True):
        row.sub_(delta * gate[column])
        row.copy_(torch.nn.functional.softshrink(row, lambda1 / lambda2))
    return out


class WeitOptimizer(torch.optim.Optimizer):
    """Trains B, m, A and alpha (and old A_i) of theta = B*sigma(m) + A + sum_n alpha_n*KB_n, and local parameters.

    The loss is CE + lambda1*(|A|_1 + sum_i |A_i|_1) + lambda_mask*|sigma(m)|_1
    + lambda2/2 * sum_i ||dB*sigma(m_i) + dA_i||^2 over earlier tasks i, where dB and dA_i are the changes since the
    task began; CE is what the training loop computes, the rest is added here. Construction writes theta into the
    model and lets its kinds and `local` have gradients; other parameters are left as they are. From then on, train
    as usual. Schedulers of the learning rate work. A kind without a gradient counts as one with gradient zero;
    gradients that are not finite are not looked for.

    Parameters
    ----------
    model, structure
        Any module and where its values live. Its parameter objects are kept.
    parts
        Where training starts; copied, except the constants.
    local
        Parameters of the model that are trained as they are, such as biases and heads.
    name
        The update rule: torch's Adam, or its SGD without momentum.
    lambda1, lambda2, lambda_mask
        Penalties, see above. With lambda2 = 0 nothing ties B to the earlier tasks.
    retroactive
        ``"gradient"``: old A_i take part in training; a step costs O(t). ``"exact"``: B is free, and the caller
        computes the best A_i with `settle` once a round. ``"freeze"``: A_i are constants, so B alone is held back.
    raw_masks
        The penalty uses m_i for sigma(m_i), as CONFEDMADE's released code does.
    moments
        From `moments` of an optimiser with the same settings: go on where it was, bit for bit, if `parts` are its
        parts too.

    Raises
    ------
    ValueError
        A setting is out of range, or model, parts, local parameters or moments do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        parts: Parts,
        *,
        local: Sequence[nn.Parameter] = (),
        lr: float = 1e-3,
        name: Inner = "adam",
        lambda1: float = 1e-4,
        lambda2: float = 100.0,
        lambda_mask: float = 0.0,
        retroactive: Retroactive = "exact",
        raw_masks: bool = False,
        moments: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> None:
        if name not in get_args(Inner) or retroactive not in get_args(Retroactive):
            raise ValueError(f"there is no optimiser {name!r} or no retroactive mode {retroactive!r}")
        if not (isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be finite and not negative, got {lr}")
        _check_penalties(lambda1, lambda2, lambda_mask)
        parts.check(structure)
        kinds = structure.params(model)
        names = _local_names(model, kinds, local)
        super().__init__([{"params": [*kinds, *local], "lr": lr}], {"lr": lr})
        for p in self.param_groups[0]["params"]:
            p.requires_grad_(True)
        device = kinds[0].device
        self._structure, self._kinds, self._name = structure, kinds, name
        self._column, self._lengths = structure.column.to(device), structure.lengths().to(device)
        here = Parts(*(getattr(parts, f.name).detach().to(device, torch.float32) for f in fields(Parts)))
        self._l1, self._l2, self._lm = lambda1, lambda2, lambda_mask
        own = ["base", "adaptive", "mask", "alpha"] + ["old_adaptive"] * (retroactive == "gradient")
        self._values = {k: getattr(here, k).clone(memory_format=torch.contiguous_format) for k in own}
        self._parts = replace(here, **self._values)
        self._grads = {k: torch.zeros_like(v) for k, v in self._values.items()}
        for k, v in self._values.items():
            v.grad = self._grads[k]
        self._prepare(retroactive, raw_masks)
        self._trained = {k: v for k, v in self._values.items() if v.numel()} | dict(zip(names, local, strict=True))
        self._inner: torch.optim.Optimizer
        if name == "adam":
            # The fused kernel passes over memory once: on a CPU it is 6 times as fast as foreach.
            self._inner = Adam(self._trained.values(), lr=lr, fused=device.type in ("cpu", "cuda"))
        else:
            self._inner = SGD(self._trained.values(), lr=lr, foreach=True)
        if moments is not None:
            self._restore(moments)
        self._write()

    def _prepare(self, retroactive: Retroactive, raw_masks: bool) -> None:
        """Work vectors, and what of the penalty stays the same over all steps."""
        n, device = self._structure.numel, self._column.device
        self._g, self._work, self._gate = (torch.empty(n, device=device) for _ in range(3))
        self._old_gates: Tensor | None = None
        self._pull: Tensor | None = None
        old = self._parts.old_masks
        if not self._l2 or not len(old):
            return
        gates = old if raw_masks else torch.sigmoid(old)
        if retroactive == "gradient":
            self._old_gates = gates[:, self._column]
        elif retroactive == "freeze":
            # With dA_i = 0 the pull on B is dB * lambda2 * sum_i sigma(m_i)^2.
            self._pull = (self._l2 * (gates * gates).sum(0))[self._column]

    @property
    def structure(self) -> Structure:
        """Where the packed values live."""
        return self._structure

    @property
    def parts(self) -> Parts:
        """The parts as they are now; what is trained is copied, constants are not."""
        return replace(self._parts, **{name: v.clone() for name, v in self._values.items()})

    def moments(self) -> dict[str, np.ndarray[Any, Any]]:
        """Copy what the update rule carries from step to step: flat float32 arrays, step counts int64 (1,).

        The names do not depend on the run: ``base.exp_avg``, ``local.<parameter>.step`` and so on.
        """
        out: dict[str, np.ndarray[Any, Any]] = {}
        for name, value in self._trained.items():
            for field in STATE[self._name]:
                if value in self._inner.state:
                    array = self._inner.state[value][field].detach().cpu().reshape(-1).numpy()
                    out[f"{name}.{field}"] = array.astype(np.int64 if field == "step" else np.float32)
        return out

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: the parts have one step size; other parameters go into `local`."""
        if self.param_groups:
            raise ValueError("this optimiser has one group; give other parameters of the model as local ones")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parts from the gradients in the model and write the next theta."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._backward()
        # Schedulers write into this optimiser's group.
        self._inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._inner.step()
        self._write()
        return loss

    def _backward(self) -> None:
        """Fill the gradients of the parts from dL/dtheta in the model."""
        g = self._structure.gather([p.grad for p in self._kinds], out=self._g)
        value, grad, kb = self._values, self._grads, self._parts.knowledge
        torch.mul(g, self._gate, out=grad["base"])
        torch.sign(value["adaptive"], out=grad["adaptive"]).mul_(self._l1).add_(g)
        torch.mul(g, value["base"], out=self._work)
        gate = torch.sigmoid(value["mask"])
        along = torch.segment_reduce(self._work, "sum", lengths=self._lengths, initial=0.0, unsafe=True)
        torch.mul(along.add_(self._lm), gate * (1 - gate), out=grad["mask"])
        if len(kb):
            for kind, part in enumerate(self._structure.kind_slices()):
                grad["alpha"][:, kind] = kb[:, part] @ g[part]
        if "old_adaptive" in value:
            torch.sign(value["old_adaptive"], out=grad["old_adaptive"]).mul_(self._l1)
        if self._pull is not None:
            grad["base"].addcmul_(torch.sub(value["base"], self._parts.snap_base, out=self._work), self._pull)
        if self._old_gates is not None:
            self._anchor(self._old_gates)

    def _anchor(self, gates: Tensor) -> None:
        """Add the gradients of lambda2/2 * sum_i ||dB*s_i + dA_i||^2; g is dead by now."""
        delta = torch.sub(self._values["base"], self._parts.snap_base, out=self._work)
        old, snap = self._values["old_adaptive"], self._parts.snap_adaptive
        for i, gate in enumerate(gates):
            drift = torch.sub(old[i], snap[i], out=self._g).addcmul_(delta, gate)
            self._grads["old_adaptive"][i].add_(drift, alpha=self._l2)
            self._grads["base"].addcmul_(drift, gate, value=self._l2)

    @torch.no_grad()
    def _write(self) -> None:
        value = self._values
        torch.index_select(torch.sigmoid(value["mask"]), 0, self._column, out=self._gate)
        base, adaptive, alpha, kb = value["base"], value["adaptive"], value["alpha"], self._parts.knowledge
        theta = compose_(self._structure, base, self._gate, adaptive, alpha, kb, self._work)
        self._structure.scatter_(self._kinds, theta)

    def state_dict(self) -> dict[str, Any]:
        """Refuse: what this optimiser trains is state of a client, which outlives it; see `parts` and `moments`."""
        raise NotImplementedError("keep `parts` and `moments()`, and give both to a new WeitOptimizer")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse, see `state_dict`."""
        raise NotImplementedError("build a new WeitOptimizer from the `parts` and `moments()` that were kept")

    def _restore(self, moments: Mapping[str, np.ndarray[Any, Any]]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        wanted = STATE[self._name]
        for i, (name, value) in enumerate(self._trained.items()):
            have = [field for field in wanted if f"{name}.{field}" in moments]
            if not have:
                continue  # It never had a gradient.
            if len(have) < len(wanted):
                raise ValueError(f"moments of {name!r} lack one of {wanted}")
            state[i] = {}
            for field in wanted:
                array = np.asarray(moments[f"{name}.{field}"])
                shape = torch.Size(()) if field == "step" else value.shape
                if array.shape != (shape.numel(),):
                    raise ValueError(f"{name}.{field} must hold {shape.numel()} values, got shape {array.shape}")
                state[i][field] = torch.from_numpy(array.astype(np.float32)).reshape(shape)
        used = {f"{name}.{field}" for name in self._trained for field in wanted}
        if strangers := sorted(set(moments) - used):
            raise ValueError(f"nothing has the moments {strangers[0]!r}: other parts or settings?")
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": state, "param_groups": groups})


def _local_names(model: nn.Module, kinds: Sequence[Tensor], local: Sequence[Tensor]) -> list[str]:
    names = {id(p): name for name, p in named_parameters(model)}
    taken = {id(p) for p in kinds}
    for p in local:
        if id(p) not in names or id(p) in taken:
            raise ValueError("local parameters are parameters of the model that are no kinds, each given once")
        taken.add(id(p))
    return [f"local.{names[id(p)]}" for p in local]


def _check_penalties(*penalties: float) -> None:
    if not all(isfinite(x) and x >= 0 for x in penalties):
        raise ValueError(f"penalties must be finite and not negative, got {penalties}")
