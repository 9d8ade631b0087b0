"""Slow, readable twins of the baselines' server halves: plain loops over positions."""

from __future__ import annotations


def mean_of_weights(method, rounds):
    """The weighted mean of the last round that brought anything, of whatever the method federates."""
    found = method.start
    for updates in rounds:
        if updates:
            total = sum(u.weight for u in updates)
            found = [
                sum(u.weight * float(u.payload.dense["weights"][i]) for u in updates) / total
                for i in range(len(method.start))
            ]
    return found


def signs(method, rounds):
    """The whole network, by name: c times the majority's sign, and the mean of the rest."""
    plus, votes, rest = [0] * method.spec.numel, 0, [float(v) for v in method.start]
    for updates in rounds:
        if not updates:
            continue
        votes, total = len(updates), sum(u.weight for u in updates)
        for i in range(method.spec.numel):
            plus[i] = sum(int(u.payload.bits["signs"][i // 8]) >> (i % 8) & 1 for u in updates)
        for i in range(len(rest)):
            rest[i] = sum(u.weight * float(u.payload.dense["rest"][i]) for u in updates) / total
    binary, i = {}, 0
    initial = method.signs(method.broadcast(method.init()))
    for name, size, c in zip(method.spec.names, method.spec.sizes, method.scale, strict=True):
        values = []
        for _ in range(size):
            minus = votes - plus[i]
            up = plus[i] > minus or (plus[i] == minus and initial[i])
            values.append(c if up else -c)
            i += 1
        binary[name] = values
    found, at = [], 0
    for name, size in method.order:
        if name in binary:
            found += binary[name]
        else:
            found += rest[at : at + size]
            at += size
    return found
