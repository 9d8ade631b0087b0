"""A client's turn under a theta that is neither 0 nor 1 anywhere."""

from __future__ import annotations

import numpy as np
from federation import network, steps
from following_fleet import wide

from fedmask_flwr.methods import Training
from fedmask_flwr.methods.stepping import LEVELS
from fedmask_flwr.wire import Counts, Payload

D = 2816


def built(kind, **settings):
    """A method of the wide network."""
    model = network(wide)
    return kind(kind.layout(model), model, kind.Config(**settings))


def trained(found, turn, got, n=15):
    """The network and its optimiser after n steps."""
    model = network(wide)
    optimizer = found.begin(got, model, Training(), turn, {})
    steps(model, optimizer, n)
    return model, optimizer


def somewhere(seed=1):
    """A broadcast of any theta."""
    ones = np.random.default_rng(seed).integers(26, LEVELS - 25, D).astype(np.uint32)
    return Payload(counts={"ones": Counts(ones, LEVELS)})
