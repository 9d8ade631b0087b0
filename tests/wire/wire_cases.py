"""Inputs the wire tests share."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from fedmask_flwr.wire import Counts, Payload, SideInfo, codec_names, pack, pack_bits, positions

DIGEST = bytes(range(8))
BIT_NAMES = codec_names("bits")
FIXED_D = (0, 1, 2, 7, 8, 9, 11500)
DENSITIES = (0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 0.8, 0.99, 1.0)


def split(draw, d):
    """Any layer sizes that sum to d, empty layers included."""
    cuts = sorted(draw(st.lists(st.integers(0, d), max_size=4)))
    return tuple(b - a for a, b in zip([0, *cuts], [*cuts, d], strict=True))


@st.composite
def masks(draw):
    """Packed bits, layer sizes, and a reference or None; density differs between layers."""
    d = draw(st.one_of(st.sampled_from(FIXED_D), st.integers(0, 3000)))
    sizes = split(draw, d)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    p = np.repeat([draw(st.sampled_from(DENSITIES)) for _ in sizes], sizes)
    delta = rng.random(d) < p
    reference = rng.random(d) < 0.5 if draw(st.booleans()) else None
    bits = delta if reference is None else delta ^ reference
    return pack_bits(bits), SideInfo(
        sizes, None if reference is None else pack_bits(reference), draw(classes_of(delta))
    )


@st.composite
def classes_of(draw, delta):
    """Classes that say nothing of the delta, or much, or all; few or 256 of them; or none."""
    d, rng = delta.size, np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(("none", "one", "few", "every", "layers", "telling")))
    if kind == "none":
        return None
    if kind == "layers":
        classes = np.arange(d) * 256 // max(d, 1)
    elif kind == "telling":
        classes = 7 + 9 * delta + (rng.random(d) < 0.1)
    else:
        classes = rng.integers(0, {"one": 1, "few": 5, "every": 256}[kind], d) + (41 if kind == "few" else 0)
    return lambda: classes.astype(np.uint8)


@st.composite
def count_vectors(draw):
    """Counts and layer sizes."""
    n = draw(st.one_of(st.sampled_from((0, 1, 2, 9, 20000)), st.integers(0, 2000)))
    top = draw(st.one_of(st.integers(0, 40), st.sampled_from((255, 4095, 4096, 65535, 65536, 2**32 - 1))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from(("flat", "ends", "equal", "low", "mixed")))
    if spread == "flat":
        values = rng.integers(0, top + 1, n)
    elif spread == "ends":
        values = np.where(rng.random(n) < 0.1, rng.integers(0, top + 1, n), np.where(rng.random(n) < 0.5, 0, top))
    elif spread == "equal":
        values = np.full(n, rng.integers(0, top + 1))
    elif spread == "low":
        values = np.minimum(rng.geometric(0.4, n) - 1, top)
    else:
        values = np.where(np.arange(n) < n // 2, 0, rng.integers(0, top + 1, n))
    return Counts(values.astype(np.uint32), top), SideInfo(split(draw, n))


def sample_payload(kind, d, seed=0, p=0.05):
    """A payload of one field "x" of d elements of this kind, with meta, and what both ends know."""
    rng = np.random.default_rng(seed)
    classes = np.arange(d, dtype=np.uint8) % 4
    known = SideInfo(
        (d // 3, 0, d - d // 3 - d // 5, d // 5), pack_bits(rng.random(d) < 0.5), lambda: 3 * classes + 1
    )
    meta = {"examples": 60, "loss": 0.25, "who": "node-1"}
    if kind == "bits":
        odds = np.array([2.0, 1.2, 0.6, 0.2]) * p
        return Payload(bits={"x": pack_bits(rng.random(d) < odds[classes]) ^ known.reference}, meta=meta), known
    if kind == "counts":
        values = np.minimum(rng.geometric(min(1.0, p + 0.3), d) - 1, 9).astype(np.uint32)
        return Payload(counts={"x": Counts(values, 9)}, meta=meta), known
    return Payload(dense={"x": rng.standard_normal(d).astype(np.float32)}, meta=meta), known


def all_names():
    """(kind, codec name) of everything that can be on the wire."""
    return [(kind, n) for kind in ("bits", "counts", "dense") for n in codec_names(kind) if n != "auto"]


def frame_of(kind, name, d, **kwargs):
    payload, known = sample_payload(kind, d, **kwargs)
    return pack(payload, digest=DIGEST, round_=5, known=known, codecs={kind: name}), known


def count_ones(bits, known):
    delta = known.delta(bits)
    pos = positions(delta, known.numel)
    edges = np.searchsorted(pos, np.cumsum((0, *known.sizes)))
    return tuple(int(n) for n in np.diff(edges))
