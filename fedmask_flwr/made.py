"""MADE (arXiv:1502.03509): a density of binary vectors, from an autoencoder whose weights are masked.

Each unit has a degree, and a weight is kept only where the degrees say that no output sees its own input or a
later one, so the D logits are the conditionals of ``p(x) = prod_d p(x_d | earlier inputs)``. The masks are drawn
from the seed with integers only (`fedmask_flwr.masks.words`): equal seeds give equal masks on every machine, and
the default seed the same masks on every device. `MADE.mask_id` names them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from .autoregressive import Bits, MaskedLinear, below, degrees, digest_of, masks_of
from .masks import Key, thresholds, words

Order = Literal["natural", "random", "cycle"]
Connect = Literal["fixed", "cycle"]
Activation = Literal["relu", "softplus"]


@final
class MADE(nn.Module):
    """Masked autoencoder for distribution estimation.

    Parameters are ``layers.i.weight`` [out, in] and ``layers.i.bias`` (hidden layers, then the output),
    ``direct.weight`` (D, D) and ``condition.i.weight`` (the shape of ``layers.i.weight``). A weight under a 0
    never changes a logit, and its gradient is exactly 0. New weights are Glorot-uniform from torch's generator,
    biases 0.

    Parameters
    ----------
    inputs
        D, the number of binary inputs.
    hidden
        Widths of the hidden layers.
    masks
        R_m, how many masks there are; a training step uses the selected one. They take 4 bytes a weight each.
    order
        Factorisation order: ``natural`` is that of the inputs, ``random`` one permutation, ``cycle`` one a mask.
    connect
        Hidden degrees: ``fixed`` draws them once, ``cycle`` once a mask.
    direct
        Weights from the inputs straight to the outputs.
    condition
        Weights that tell each unit which of its inputs are masked (section 4.3); of use with several masks only.
    activation
        Of the hidden units.
    seed
        What order and connectivity are drawn from.

    Raises
    ------
    ValueError
        A setting is out of range, or there are several masks and nothing that differs between them.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (500,),
        *,
        masks: int = 1,
        order: Order = "natural",
        connect: Connect = "fixed",
        direct: bool = True,
        condition: bool = False,
        activation: Activation = "relu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(inputs, hidden, masks, order, connect, activation)
        self.inputs, self.masks_count = inputs, masks
        self._index = 0
        self._activation = functional.relu if activation == "relu" else functional.softplus
        orders = [None if order == "natural" else r if order == "cycle" else 0 for r in range(masks)]
        m = [degrees(inputs, hidden, seed, orders[r], r if connect == "cycle" else 0) for r in range(masks)]
        self._orders = [d[0] for d in m]
        *stacks, straight = (np.stack(layer) for layer in zip(*map(masks_of, m), strict=True))
        self.layers = nn.ModuleList(MaskedLinear(stack) for stack in stacks)
        if order != "cycle":
            straight = straight[:1]  # the same for every mask
        self.direct = MaskedLinear(straight, bias=False) if direct else None
        self.condition = nn.ModuleList(_like(stack) for stack in stacks) if condition else None
        self._mask_id = digest_of([*stacks, straight] if direct else stacks)

    def select(self, index: int) -> None:
        """Use mask `index` modulo R_m from now on, in `forward` and in the training mode of `nll`."""
        self._index = index % self.masks_count

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, D) of every input given the earlier ones, under the selected mask.

        `x` is (n, D), or anything of n examples that flattens to that.

        Raises
        ------
        ValueError
            An example has not D values.
        """
        return self._logits(self._flat(x), self._index)

    def nll(self, x: Tensor, valid: int | None = None) -> Tensor:
        """Negative log-likelihood (n,) in nats of binary vectors `x`, summed over the inputs.

        In training mode this is that of the selected mask. In evaluation mode probabilities, not logits, are
        averaged over all R_m masks, which keeps them a density.

        Parameters
        ----------
        x
            (n, D) of 0 and 1, or anything of n examples that flattens to that.
        valid
            Sum over the first `valid` inputs only. The others are padding and must be 0: then this is a density
            of the first `valid`. None: all D.

        Raises
        ------
        ValueError
            An example has not D values or `valid` is not in 1..D; in evaluation mode also if a value is not 0 or
            1 or the padding is not 0 (training does not look, which would wait for the device in every step).
        """
        x = self._flat(x)
        valid = self.inputs if valid is None else valid
        if not 1 <= valid <= self.inputs:
            raise ValueError(
                f"valid must be 1..{self.inputs}, the number of inputs that are no padding, not {valid}"
            )
        if self.training:
            return self._nll(x, valid, self._index)
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("MADE is a density of 0s and 1s: binarise the inputs, for example `x > 0.5`")
        if bool(x[:, valid:].any()):
            raise ValueError(f"inputs from {valid} on are padding and must be 0: set them to 0, or raise `valid`")
        each = [self._nll(x, valid, r) for r in range(self.masks_count)]
        return each[0] if len(each) == 1 else math.log(len(each)) - torch.logsumexp(-torch.stack(each), 0)

    def structure(self) -> dict[str, Tensor]:
        """Where weights can ever matter: a bool tensor of the shape of each, by name; the OR of all masks."""
        ever = {f"layers.{i}.weight": _ever(layer) for i, layer in enumerate(self.layers)}
        if self.direct is not None:
            ever["direct.weight"] = _ever(self.direct)
        if self.condition is not None:
            ever |= {f"condition.{i}.weight": _ever(layer) for i, layer in enumerate(self.layers)}
        return ever

    @property
    def mask_id(self) -> str:
        """32 hex digits that differ when any mask does (SHA-256 of shapes and bits)."""
        return self._mask_id

    @torch.no_grad()
    def sample(self, n: int, key: Key, index: int | None = None) -> Tensor:
        """Draw n vectors (n, D) of 0 and 1, input after input.

        Equal keys give equal samples, and the first of many are those of few; across machines a sample may
        differ where rounding moves a probability past its uniform word.

        Parameters
        ----------
        key
            From `fedmask_flwr.masks.derive`. Sample i uses words ``i*(D+1) .. i*(D+1)+D``.
        index
            The mask to draw under; None: each sample's own, at random, so that the samples have the density of
            `nll` in evaluation mode.

        Raises
        ------
        ValueError
            `n` is negative, ``n*(D+1)`` exceeds 2**32, or the weights give NaN.
        """
        w = words(key, n * (self.inputs + 1)).reshape(n, self.inputs + 1)
        chosen = below(w[:, -1], self.masks_count) if index is None else np.full(n, index % self.masks_count)
        weight = self._layer(0).weight
        out = torch.zeros(n, self.inputs, dtype=weight.dtype, device=weight.device)
        for r in np.unique(chosen):
            rows = np.flatnonzero(chosen == r)
            out[torch.from_numpy(rows).to(out.device)] = self._ancestral(w[rows], int(r))
        return out

    def _ancestral(self, w: NDArray[np.int32], index: int) -> Tensor:
        """A sample for each row of words, under one mask; a new bit updates the first layer, not all of it."""
        matrices = [self._layer(i).masked(index) for i in range(len(self.layers))]
        biases = [self._bias(i, index) for i in range(len(self.layers))]
        first, *middle, last = zip(matrices, biases, strict=True)
        straight = None if self.direct is None else self.direct.masked(index)
        x = first[0].new_zeros(len(w), self.inputs)
        a = first[1].repeat(len(w), 1)
        for d in np.argsort(self._orders[index]).tolist():
            h = self._activation(a)
            for matrix, bias in middle:
                h = self._activation(functional.linear(h, matrix, bias))
            z = h @ last[0][d] + last[1][d]
            if straight is not None:
                z = z + x @ straight[d]
            bits = w[:, d] < thresholds(z.double().sigmoid().cpu().numpy())
            x[:, d] = torch.from_numpy(bits).to(x)
            a += x[:, d, None] * first[0][:, d]
        return x

    def _logits(self, x: Tensor, index: int) -> Tensor:
        h, last = x, len(self.layers) - 1
        for i in range(last):
            h = self._activation(self.layers[i](h, index, self._bias(i, index)))
        z: Tensor = self.layers[last](h, index, self._bias(last, index))
        return z if self.direct is None else z + self.direct(x, index)

    def _nll(self, x: Tensor, valid: int, index: int) -> Tensor:
        z = self._logits(x, index)[:, :valid]
        return functional.binary_cross_entropy_with_logits(z, x[:, :valid], reduction="none").sum(1)

    def _bias(self, i: int, index: int) -> Tensor:
        """Layer i's bias, plus its conditioning weights times a vector of ones."""
        layer = self._layer(i)
        if self.condition is None:
            return layer.bias
        extra = self.condition[i].weight
        assert isinstance(extra, Tensor)
        return layer.bias + layer.masked(index, extra).sum(1)

    def _layer(self, i: int) -> MaskedLinear:
        layer = self.layers[i]
        assert isinstance(layer, MaskedLinear)
        return layer

    def _flat(self, x: Tensor) -> Tensor:
        flat = x.flatten(1) if x.ndim > 1 else x
        if flat.ndim != 2 or flat.shape[1] != self.inputs:
            raise ValueError(f"expected (n, {self.inputs}) or what flattens to it, got {tuple(x.shape)}")
        return flat.to(self._layer(0).weight.dtype)


def made(
    in_shape: Sequence[int],
    num_classes: int,
    hidden: Sequence[int] | int = (500,),
    masks: int = 1,
    order: Order = "natural",
    connect: Connect = "fixed",
    direct: bool = True,
    condition: bool = False,
    seed: int = 0,
) -> MADE:
    """`MADE` over ``prod(in_shape)`` binary inputs, with the signature of the builders in `models`.

    `num_classes` is ignored: a density has no classes. An integer `hidden` is one hidden layer.

    Raises
    ------
    ValueError
        As `MADE`.
    """
    widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    return MADE(
        math.prod(in_shape),
        widths,
        masks=masks,
        order=order,
        connect=connect,
        direct=bool(direct),
        condition=bool(condition),
        seed=seed,
    )


def _check(inputs: int, hidden: Sequence[int], masks: int, order: str, connect: str, activation: str) -> None:
    if inputs < 2:
        raise ValueError(f"MADE needs at least 2 inputs, got {inputs}: one bit has nothing to be conditioned on")
    if not hidden or min(hidden) < 1:
        raise ValueError(f"hidden must name at least one width of at least 1, such as (500,), not {tuple(hidden)}")
    if masks < 1:
        raise ValueError(f"masks must be at least 1, not {masks}")
    for name, value, known in (
        ("order", order, get_args(Order)),
        ("connect", connect, get_args(Connect)),
        ("activation", activation, get_args(Activation)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    if masks > 1 and "cycle" not in (order, connect):
        raise ValueError(
            f"all {masks} masks would be equal: set order='cycle' or connect='cycle' (or both), or masks=1"
        )


def _like(stack: Bits) -> nn.Linear:
    """Conditioning weights [out, in]; the mask is that of the layer."""
    linear = nn.Linear(stack.shape[2], stack.shape[1], bias=False)
    nn.init.xavier_uniform_(linear.weight)
    return linear


def _ever(layer: nn.Module) -> Tensor:
    assert isinstance(layer, MaskedLinear)
    return layer.mask.bool().any(0)
