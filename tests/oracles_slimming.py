"""Slow, readable twins of the structured methods' servers and of LTH's, for ``tiny.net`` (8 - 32 - 3)."""

from __future__ import annotations

import math

import numpy as np
import oracles_quota as rules

IN, HIDDEN, OUT = 8, 32, 3


def there(keep):
    """Floats of the network that are left: 1.bias, 1.weight, 3.bias, 3.weight, by name."""
    flags = [bool(keep[i]) for i in range(HIDDEN)]
    flags += [bool(keep[i]) for i in range(HIDDEN) for _ in range(IN)]
    flags += [True] * OUT
    return flags + [bool(keep[i]) for _ in range(OUT) for i in range(HIDDEN)]


def full(values, flags):
    """Put values back in their places, 0 elsewhere."""
    rest = iter(values)
    out = [float(next(rest)) if flag else 0.0 for flag in flags]
    assert next(rest, None) is None
    return out


def mean(updates):
    total = sum(u.weight for u in updates)
    n = updates[0].payload.dense["weights"].size
    return [sum(u.weight * float(u.payload.dense["weights"][i]) for u in updates) / total for i in range(n)]


def bit(packed, i):
    return int(packed[i // 8]) >> (i % 8) & 1


def lost(method, done):
    config = method.config
    part = rules.share(config.prune_to, done, config.search_rounds)
    return rules.goals([HIDDEN], part, config.keep_min)


def mpfl(method, rounds):
    """Filters that are left, votes of all rounds, the network."""
    keep, history, done, weights = [True] * HIDDEN, [0] * HIDDEN, 0, None
    for updates in rounds:
        if not updates:
            continue
        if done == method.config.search_rounds:
            weights = full(mean(updates), there(keep))
            continue
        votes = [sum(bit(u.payload.bits["vote"], i) for u in updates) for i in range(HIDDEN)]
        history = [a + b for a, b in zip(history, votes, strict=True)]
        done += 1
        goal, least = lost(method, done), method.config.keep_min
        if method.config.rule == "quota":
            keep = rules.quota(votes, history, keep, [HIDDEN], goal)
        elif method.config.rule == "released":
            keep = rules.released(votes, len(updates), keep, [HIDDEN], goal, least)
        else:
            percent = round(100 * method.config.consensus)
            keep = rules.threshold(votes, len(updates), keep, [HIDDEN], least, percent)
    if weights is None:
        weights = [float(v) * flag for v, flag in zip(method.start, there(keep), strict=True)]
    return [*keep, *history, *weights]


def pruning_fl(method, rounds):
    """Filters that are left, the network."""
    keep, done, weights = [True] * HIDDEN, 0, [float(v) for v in method.start]
    for updates in rounds:
        if not updates:
            continue
        weights = full(mean(updates), there(keep))
        if done < method.config.search_rounds:
            done += 1
            rows = [weights[HIDDEN + IN * i : HIDDEN + IN * (i + 1)] for i in range(HIDDEN)]
            norms = [math.sqrt(sum(v * v for v in row)) for row in rows]
            keep = rules.quota(norms, [0] * HIDDEN, keep, [HIDDEN], lost(method, done))
            weights = [v * flag for v, flag in zip(weights, there(keep), strict=True)]
    return [*keep, *weights]


def lth(method, rounds):
    """The network, 0 where it is pruned."""
    layers = [
        range(HIDDEN, HIDDEN * (1 + IN)),
        range(HIDDEN * (1 + IN) + OUT, HIDDEN * (1 + IN) + OUT + OUT * HIDDEN),
    ]
    left, start, done = [True] * method.floats, [float(v) for v in method.start], 0
    weights, config = start, method.config
    for updates in rounds:
        if not updates:
            continue
        weights = full(mean(updates), left)
        done += 1
        if done % config.cycle == 0 and done // config.cycle <= config.cycles:
            for layer in layers:
                ranked = sorted((i for i in layer if left[i]), key=lambda i: (abs(np.float32(weights[i])), i))
                for i in ranked[: int(config.prune_each * len(ranked))]:
                    left[i] = False
            weights = [v * flag for v, flag in zip(start, left, strict=True)]
    return weights


def visible(method, state):
    """What ``mpfl`` and ``pruning_fl`` return."""
    keep = [bit(state.keep, i) for i in range(HIDDEN)]
    network = full(method.result(state).dense["weights"], there(keep))
    return [*keep, *getattr(state, "history", ()), *network]


def reply(method, state, client, rng):
    """A random vote within the budget, or random weights."""
    from fedmask_flwr.wire import Payload, pack_bits, unpack_bits

    keep = unpack_bits(state.keep, HIDDEN)
    if state.searched == method.config.search_rounds:
        return Payload(dense={"weights": rng.normal(size=sum(there(keep))).astype(np.float32)})
    vote = keep.copy()
    left = rng.permutation(np.flatnonzero(keep))
    vote[left[: max(lost(method, state.searched + 1)[0] - int((~keep).sum()), 0)]] = False
    return Payload(bits={"vote": pack_bits(vote)})
