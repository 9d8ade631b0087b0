"""Write a mask into a model, without training it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .keyed import Key, bernoulli, thresholds
from .spec import MaskSpec

Mode = Literal["sampled", "threshold", "expected"]


@torch.no_grad()
def frozen_weights(model: nn.Module, spec: MaskSpec) -> Tensor:
    """Flat float32 copy of the weights that `spec` covers, in mask order, on the model's device.

    Take it before a mask is written: afterwards the model holds w*m.

    Raises
    ------
    ValueError
        The model does not fit the spec, or spreads the masked weights over several devices.
    """
    params = spec.params(model)
    devices = {p.device for p in params}
    if len(devices) > 1:
        raise ValueError(f"masked weights lie on several devices ({devices}): move the model to one device")
    return torch.cat([p.detach().to(torch.float32).reshape(-1) for p in params])


@torch.no_grad()
def write_mask(model: nn.Module, spec: MaskSpec, frozen: Tensor, values: Tensor) -> None:
    """Set the model's covered weights to ``w * values`` in place.

    Parameters
    ----------
    frozen
        w, (spec.weights,), from `frozen_weights`.
    values
        (d,) bool or float: a mask, or probabilities for the expected network.

    Raises
    ------
    ValueError
        The model, `frozen` or `values` does not fit the spec.
    """
    params = spec.params(model)
    device = params[0].device
    weights = spec.split_weights(frozen.to(device)).values()
    masks = spec.split(values.to(device)).values()
    for p, w, m in zip(params, weights, masks, strict=True):
        torch.mul(w, m if m.dtype == torch.bool else m.to(torch.float32), out=p)


def mask_values(theta: NDArray[np.float64], mode: Mode, key: Key | None = None) -> NDArray[Any]:
    """Turn probabilities theta (d,) into the values to evaluate with.

    ``"sampled"``: bool, a draw under `key`. ``"threshold"``: bool, ``theta >= 1/2``. ``"expected"``:
    float32, theta itself.

    Raises
    ------
    ValueError
        Unknown mode, or sampling without a key.
    """
    if mode == "sampled":
        if key is None:
            raise ValueError("mode 'sampled' needs a key, e.g. derive(seed, 'eval', round)")
        return bernoulli(key, thresholds(theta))
    if mode == "threshold":
        return np.asarray(theta >= 0.5)
    if mode == "expected":
        return np.asarray(theta, np.float32)
    raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
