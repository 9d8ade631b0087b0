"""Which parameters belong together: what the baselines that federate a part of the network share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def layers(model: nn.Module) -> list[tuple[nn.Parameter, ...]]:
    """Weight and bias of each module whose weight has 2 or more dimensions, in model order."""
    found = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].ndim >= 2:
            found.append(tuple(own[leaf] for leaf in ("weight", "bias") if leaf in own))
    return found


def last_layers(model: nn.Module, n: int) -> frozenset[str]:
    """Names of the parameters of the last ``n`` layers.

    Raises
    ------
    ValueError
        When the model has fewer.
    """
    found = layers(model)
    if n > len(found):
        raise ValueError(f"{n} layers are asked for, but the model has {len(found)} with weights: ask for fewer")
    return names_of(model, (p for layer in found[len(found) - n :] for p in layer))


def names_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> frozenset[str]:
    """All names of these parameters, as ``plain`` gives them: a tied one has several."""
    wanted = {id(p) for p in parameters}
    return frozenset(plain(name) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in wanted)


def plain(name: str) -> str:
    """Return the name as if the model had not been through ``torch.compile``."""
    return name.replace("_orig_mod.", "")
