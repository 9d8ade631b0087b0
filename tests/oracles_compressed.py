"""Slow, readable twins of the server halves that decode a compressed update; and replies of random content."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from fedmask_flwr.masks import Key, words
from fedmask_flwr.wire import Counts, Payload


def bit(bits, i):
    return int(bits[i // 8]) >> (i % 8) & 1


def moving(decode, vote=None):
    """The oracle of a method: the weights after all rounds, one float at a time."""

    def oracle(method, rounds):
        w = [float(x) for x in method.start]
        learned = [i for i in range(len(w)) if method.learned[i]]
        others = [i for i in range(len(w)) if not method.learned[i]]
        for updates in filter(None, rounds):
            total = sum(u.weight for u in updates)
            deltas = [decode(method, u.payload) for u in updates]
            for j, i in enumerate(learned):
                if vote:
                    step = vote(method, [delta[j] for delta in deltas])
                else:
                    step = sum(u.weight * delta[j] for u, delta in zip(updates, deltas, strict=True)) / total
                w[i] = float(np.float32(w[i] + step))
            for j, i in enumerate(others):
                w[i] = sum(u.weight * float(u.payload.dense["statistics"][j]) for u in updates) / total
        return w

    return oracle


def decode_topk(method, payload):
    values = iter(payload.dense["values"])
    return [float(next(values)) if bit(payload.bits["where"], i) else 0.0 for i in range(method.d)]


def decode_signs(method, payload):
    return [1 if bit(payload.bits["signs"], i) else -1 for i in range(method.d)]


def majority(method, signs):
    total = sum(signs)
    return method.config.server_lr * ((total > 0) - (total < 0))


def decode_qsgd(method, payload):
    s, levels, norms = method.config.levels, iter(payload.counts["levels"].values), iter(payload.dense["norms"])
    found = []
    for size in method.sizes:
        for i in range(size):
            if i % (method.config.bucket or size) == 0:
                norm = float(next(norms))
            found.append(norm * (int(next(levels)) - s) / s)
    return found


@cache
def hadamard_matrix(n):
    """H[i][j] = (-1)^(ones of i & j) / sqrt(n)."""
    return np.array([[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]) / math.sqrt(n)


def decode_eden(method, payload):
    count, length = method.shape
    signs = words(Key(payload.meta["k0"], payload.meta["k1"]), count * length)
    found, start = [], 0
    for p in range(count):
        size = (p + 1) * method.d // count - start
        flat = [1 if bit(payload.bits["signs"], p * length + i) else -1 for i in range(length)]
        back = float(payload.dense["scale"][p]) * (hadamard_matrix(length) @ np.array(flat))
        found += [back[i] * (-1 if signs[p * length + i] < 0 else 1) for i in range(size)]
        start += size
    return found


def kmeans(x, m):
    """Lloyd's steps on plain lists; the higher centre wins a tie."""
    ordered = sorted(float(v) for v in x)
    centres = [ordered[int((j + 0.5) * len(ordered) / m)] for j in range(m)]
    for _ in range(30):
        groups = [nearest(v, centres) for v in ordered]
        old = list(centres)
        for j in range(m):
            if own := [v for v, g in zip(ordered, groups, strict=True) if g == j]:
                centres[j] = sum(own) / len(own)
        if centres == old:
            break
    centres = [float(np.float32(c)) for c in centres]
    return centres, [nearest(float(v), centres) for v in x]


def nearest(v, centres):
    return max(range(len(centres)), key=lambda j: (-abs(v - centres[j]), j))


def fedcode(method, rounds):
    """What clients are told after all rounds: a clustering of weights that the server keeps whole."""
    learned = [i for i in range(method.start.size) if method.learned[i]]
    m, w = method.config.centres, [float(x) for x in method.start]
    told, groups, centres = list(w), None, None
    for updates in filter(None, rounds):
        total = sum(u.weight for u in updates)
        steps = [0.0] * len(learned)
        for u in updates:
            sent = u.payload.counts.get("assignments")
            own = groups if sent is None else sent.values
            for j, i in enumerate(learned):
                steps[j] += u.weight * (float(u.payload.dense["codebook"][own[j]]) - told[i])
        for j, i in enumerate(learned):
            w[i] = float(np.float32(w[i] + steps[j] / total))
        for j, i in enumerate(i for i in range(len(w)) if not method.learned[i]):
            w[i] = float(
                np.float32(sum(u.weight * float(u.payload.dense["statistics"][j]) for u in updates) / total)
            )
        centres, groups = kmeans([w[i] for i in learned], m)
        told = list(w)
        for j, i in enumerate(learned):
            told[i] = centres[groups[j]]
    return told


topk = moving(decode_topk)
signsgd = moving(decode_signs, majority)
qsgd = moving(decode_qsgd)
eden = moving(decode_eden)


def with_statistics(method, rng, **fields):
    for name, (_, n) in method.statistics.items():
        fields["dense"] = {**fields.get("dense", {}), name: rng.random(n).astype(np.float32)}
    return Payload(**fields)


def topk_reply(method, state, client, rng):
    where = np.zeros(method.d, bool)
    where[rng.permutation(method.d)[: method.k]] = True
    values = rng.normal(size=method.k).astype(np.float32)
    bits = {"where": np.packbits(where, bitorder="little")}
    return with_statistics(method, rng, bits=bits, dense={"values": values})


def sign_reply(method, state, client, rng):
    signs = np.packbits(rng.random(method.d) < 0.5, bitorder="little")
    return with_statistics(method, rng, bits={"signs": signs})


def qsgd_reply(method, state, client, rng):
    top = 2 * method.config.levels
    levels = Counts(rng.integers(0, top + 1, method.d).astype(np.uint32), top)
    norms = rng.random(method.buckets.size).astype(np.float32)
    return with_statistics(method, rng, counts={"levels": levels}, dense={"norms": norms})


def eden_reply(method, state, client, rng):
    signs = np.packbits(rng.random(method.shape[0] * method.shape[1]) < 0.5, bitorder="little")
    scale = rng.random(method.shape[0]).astype(np.float32)
    meta = {"k0": int(rng.integers(-(2**31), 2**31)), "k1": client}
    return with_statistics(method, rng, bits={"signs": signs}, dense={"scale": scale}, meta=meta)


def fedcode_reply(method, state, client, rng):
    """All assignments before the first round and from every other client; else centres alone."""
    m = method.config.centres
    codebook = np.sort(rng.normal(size=m)).astype(np.float32)
    counts = {}
    if not state.weights.size or client % 2:
        counts["assignments"] = Counts(rng.integers(0, m, method.d).astype(np.uint32), m - 1)
    return with_statistics(method, rng, counts=counts, dense={"codebook": codebook})
