"""Slow, readable twins of MPFL's rules, written from masks.md 5.4 and 5.5: plain lists, exact fractions."""

from __future__ import annotations

from fractions import Fraction


def units(sizes):
    """The positions of each unit."""
    at, found = 0, []
    for size in sizes:
        found.append(list(range(at, at + size)))
        at += size
    return found


def share(target, done, rounds):
    """Cubic schedule s_t = s_f * (1 - (1 - t/T)^3), exactly."""
    return Fraction(target) * (1 - (1 - Fraction(min(done, rounds), rounds)) ** 3)


def goals(sizes, part, keep_min):
    """How many channels of each unit are to be gone; units of fewer than keep_min lose none."""
    return [max(min(round(part * n), n - keep_min), 0) for n in sizes]


def quota(votes, history, keep, sizes, lost):
    """Take the worst channel of a unit, one after another, until it has lost enough."""
    keep = list(keep)
    for unit, goal in zip(units(sizes), lost, strict=True):
        while sum(not keep[i] for i in unit) < goal:
            worst = min((i for i in unit if keep[i]), key=lambda i: (votes[i], history[i], i))
            keep[worst] = False
    return keep


def floor(wanted, votes, keep, unit, keep_min):
    """Put back the most wanted of a unit until keep_min (or all that there were) stay."""
    wanted = list(wanted)
    while sum(wanted[i] for i in unit) < min(keep_min, sum(keep[i] for i in unit)):
        best = max((i for i in unit if keep[i] and not wanted[i]), key=lambda i: (votes[i], -i))
        wanted[best] = True
    return wanted


def threshold(votes, voters, keep, sizes, keep_min, least):
    """Keep iff votes / N >= th; ``least`` is in hundredths."""
    out = [k and Fraction(int(v), voters) >= Fraction(least, 100) for v, k in zip(votes, keep, strict=True)]
    for unit in units(sizes):
        out = floor(out, votes, keep, unit, keep_min)
    return out


def released(votes, voters, keep, sizes, lost, keep_min):
    """``create_server_mask``: thresholds 1, .9, ... downwards, to the first that prunes at least the target."""
    out = list(keep)
    for unit, goal in zip(units(sizes), lost, strict=True):
        for tenths in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1):
            for i in unit:
                out[i] = keep[i] and 10 * int(votes[i]) >= tenths * voters
            if sum(not out[i] for i in unit) >= goal:
                break
        out = floor(out, votes, keep, unit, keep_min)
    return out
