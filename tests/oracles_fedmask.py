"""Slow, readable twins of FedMask's server and pruning, written from the paper's pseudocode."""

from __future__ import annotations

from fractions import Fraction


def bit(packed, i):
    return int(packed[i // 8]) >> (i % 8) & 1


def overlap_levels(supports, masks, d, levels):
    """What OverlapMean says, one position at a time: (level or None where nobody owns it, number of owners)."""
    found = []
    for i in range(d):
        owners = [k for k in range(len(supports)) if bit(supports[k], i)]
        if not owners:
            found.append((None, 0))
            continue
        mean = Fraction(sum(bit(masks[k], i) for k in owners), len(owners))
        level = round(mean * levels)  # ties to even
        if mean in (0, Fraction(1, 2), 1):
            assert level == mean * levels
        elif mean < Fraction(1, 2):
            level = min(max(level, 1), levels // 2 - 1)
        else:
            level = min(max(level, levels // 2 + 1), levels - 1)
        found.append((level, len(owners)))
    return found


def server(d, returns, rounds, levels=60):
    """{client: (support, vector)} as lists of d numbers after rounds of {client: (support or None, mask)}.

    ``mask`` holds a bit a position of the support. A client without a support keeps the one it has.
    """
    rows = {}
    for replies in rounds:
        full = {}
        for client, (given, mask) in replies.items():
            support = rows[client][0] if given is None else given
            bits, at = [0] * d, 0
            for i in range(d):
                if support[i]:
                    bits[i] = mask[at]
                    at += 1
            full[client] = support, bits
        for client, (support, bits) in full.items():
            vector = [0] * d
            for i in range(d):
                owners = [k for k in full if full[k][0][i]]
                if not support[i]:
                    continue
                if len(owners) < 2:
                    vector[i] = levels * bits[i]
                    continue
                mean = Fraction(sum(full[k][1][i] for k in owners), len(owners))
                if returns == "bit" and mean == Fraction(1, 2):
                    vector[i] = levels * bits[i]
                elif mean in (0, Fraction(1, 2), 1):
                    vector[i] = int(levels * mean)
                else:
                    low, high = (1, levels // 2 - 1) if mean < Fraction(1, 2) else (levels // 2 + 1, levels - 1)
                    vector[i] = min(max(round(levels * mean), low), high)
            rows[client] = support, vector
    return rows


def keep_largest(importance, shapes, prune, layers, by):
    """Support as a list of bools: a plain sort in each of the last ``layers`` layers."""
    support, start = [], 0
    for number, shape in enumerate(shapes):
        size = 1
        for n in shape:
            size *= n
        layer = [float(v) for v in importance[start : start + size]]
        kept = [True] * size
        if len(shapes) - number <= layers:
            last = number == len(shapes) - 1
            width = size // shape[0] if by == "neuron" and not last else 1
            groups = [range(g * width, (g + 1) * width) for g in range(size // width)]
            ranked = sorted(range(len(groups)), key=lambda g: (sum(layer[i] for i in groups[g]), g))
            for g in ranked[: int(prune * len(groups))]:
                for i in groups[g]:
                    kept[i] = False
        support += kept
        start += size
    return support


def fedmask(method, rounds):
    """What the suite compares: the rows of all clients, one after the other; see ``visible``."""
    told = []
    for updates in rounds:
        replies = {}
        for update in updates:
            first = update.payload.counts.get("first")
            if first is None:
                n = sum(rows_of(method, told)[update.client][0])
                replies[update.client] = None, [bit(update.payload.bits["mask"], i) for i in range(n)]
            else:
                values = first.values.tolist()
                replies[update.client] = [int(v > 0) for v in values], [int(v == 2) for v in values if v > 0]
        told.append(replies)
    rows = rows_of(method, told)
    return [number for k in sorted(rows) for part in (*rows[k],) for number in part]


def rows_of(method, told):
    return server(method.numel, method.config.returns, told)


def visible(method, state):
    """Support and vector of every client, in the order of their numbers."""
    numbers = []
    for row in range(len(state.clients)):
        numbers += [bit(state.supports[row], i) for i in range(method.numel)]
        numbers += state.means[row].tolist()
    return numbers


def reply(method, state, client, rng):
    """A random reply that the method allows: of the first form where the state does not know the client."""
    from fedmask_flwr.wire import Counts, Payload, pack_bits, popcount

    shared = method.recall(state, client)
    if not shared:
        first = rng.integers(0, 3, method.numel).astype("uint32")
        return Payload(counts={"first": Counts(first, 2)})
    return Payload(bits={"mask": pack_bits(rng.random(popcount(shared["support"])) < rng.random())})
