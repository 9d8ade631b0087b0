"""FedMask's server and its pruning: against the pseudocode, and what a device may learn of others."""

from __future__ import annotations

import numpy as np
import oracles_fedmask as oracles
import pytest
from fedmask_turns import DIGEST, build, first, fold, later, update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedmask_flwr.flower.records import read_broadcast
from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.methods import Turn
from fedmask_flwr.methods.fedmask import LEVELS, FedMaskConfig, keep_largest
from fedmask_flwr.methods.reading import read_reply
from fedmask_flwr.wire import Counts, Payload, SideInfo, WireError, pack, pack_bits, unpack_bits

every_return = pytest.mark.parametrize("returns", ["mean", "bit"])
METHODS = {returns: build(returns=returns) for returns in ("mean", "bit")}
SMALL = {
    returns: build(model=nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), returns=returns) for returns in METHODS
}
D = METHODS["mean"].numel


def flags(seed, share=0.5):
    return np.random.default_rng(seed).random(D) < share


def at(*positions):
    found = np.zeros(D, bool)
    found[list(positions)] = True
    return found


def vector(method, state, client):
    return state.means[list(state.clients).index(client)]


@given(
    st.sampled_from(["mean", "bit"]),
    st.lists(st.lists(st.integers(0, 5), unique=True, max_size=6), max_size=4),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
def test_the_server_equals_the_pseudocode(returns, turns, rejoin, seed):
    method, rng = SMALL[returns], np.random.default_rng(seed)
    state, rounds = method.init(), []
    for clients in turns:
        updates = []
        for client in clients:
            anew = rng.random() < rejoin
            payload = oracles.reply(method, method.init() if anew else state, client, rng)
            updates.append(update(client, payload))
        state = method.aggregate(state, iter(updates))
        rounds.append(updates)
        assert oracles.visible(method, state) == oracles.fedmask(method, rounds)
        assert state.clients.tolist() == sorted({k for c in turns[: len(rounds)] for k in c})


@every_return
def test_a_position_with_one_owner_is_as_its_device_had_it(returns):
    method = METHODS[returns]
    supports = [flags(1, 0.6), flags(2, 0.6), flags(3, 0.6)]
    masks = [flags(10 + k) for k in range(3)]
    state = fold(method, method.init(), **{f"k{k}": first(method, supports[k], masks[k]) for k in range(3)})
    owners = sum(s.astype(int) for s in supports)
    for k in range(3):
        alone = supports[k] & (owners == 1)
        assert alone.any()
        assert (vector(method, state, k)[alone] == LEVELS * masks[k][alone]).all()
        assert not vector(method, state, k)[~supports[k]].any()


@every_return
def test_a_device_that_did_not_train_keeps_its_row(returns):
    method, all_of = METHODS[returns], np.ones(D, bool)
    state = fold(method, method.init(), k0=first(method, all_of, flags(0)), k1=first(method, all_of, flags(1)))
    kept = vector(method, state, 0).copy()
    state = fold(method, state, k1=later(all_of, flags(2)), k2=first(method, all_of, flags(3)))
    assert (vector(method, state, 0) == kept).all()
    assert state.clients.tolist() == [0, 1, 2]


@every_return
@given(st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=20)
def test_nothing_of_other_positions_reaches_a_device(returns, seed, also_support):
    """Change another client off S_0, its mask and its support: what client 0 is told stays the same frame."""
    method, rng = METHODS[returns], np.random.default_rng(seed)
    own = rng.random(D) < 0.5
    support, mask = rng.random(D) < 0.7, rng.random(D) < 0.5
    noise = [~own & (rng.random(D) < 0.5) for _ in range(2)]
    frames = []
    for other_support, other_mask in [(support, mask), (support ^ noise[0] * also_support, mask ^ noise[1])]:
        replies = {"k0": first(method, own, flags(seed)), "k1": first(method, other_support, other_mask)}
        state = fold(method, method.init(), **replies)
        frames.append(
            pack(
                method.broadcast(state, 0),
                digest=DIGEST,
                round_=2,
                known=method.heard(method.recall(state, 0)),
                codecs=method.codecs,
            )
        )
    assert frames[0] == frames[1]


def test_a_device_is_told_as_many_values_as_it_owns():
    method = METHODS["mean"]
    state = fold(
        method, method.init(), k0=first(method, at(1, 5, 9), flags(0)), k1=first(method, flags(4), flags(1))
    )
    assert method.broadcast(state, 0).counts["mean"].values.size == 3
    assert method.broadcast(state, 7).meta == {}
    assert not method.broadcast(state, 7).counts
    assert not method.broadcast(state, None).counts


def test_ties_are_halves_and_bits_keep_the_device_s_own():
    a, b, all_of = flags(1), flags(2), np.ones(D, bool)
    for returns, method in METHODS.items():
        state = fold(method, method.init(), k0=first(method, all_of, a), k1=first(method, all_of, b))
        for k, own in enumerate((a, b)):
            assert (vector(method, state, k)[a == b] == LEVELS * own[a == b]).all()
            tied = LEVELS // 2 if returns == "mean" else LEVELS * own[a != b]
            assert (vector(method, state, k)[a != b] == tied).all()


@every_return
def test_thresholding_again_changes_nothing(returns):
    """Devices that upload what they were told are told the same again, but for ties, which stay ties."""
    method, all_of = METHODS[returns], np.ones(D, bool)
    masks = {f"k{k}": first(method, all_of, flags(k)) for k in range(3)}
    state = fold(method, method.init(), **masks)
    bits = [2 * vector(method, state, k) >= LEVELS for k in range(3)]
    again = fold(method, state, **{f"k{k}": later(all_of, bits[k]) for k in range(3)})
    for k in range(3):
        assert ((2 * vector(method, again, k) >= LEVELS) == bits[k]).all()
    twice = fold(method, again, **{f"k{k}": later(all_of, bits[k]) for k in range(3)})
    assert (twice.means == again.means).all()


@every_return
def test_the_summary_is_the_majority_of_owners(returns):
    method = METHODS[returns]
    supports, masks = [flags(k, 0.5) for k in range(3)], [flags(9 + k) for k in range(3)]
    state = fold(method, method.init(), **{f"k{k}": first(method, supports[k], masks[k]) for k in range(3)})
    result = unpack_bits(method.result(state).bits["mask"], D)
    owners = sum(s.astype(int) for s in supports)
    ones = sum((s & m).astype(int) for s, m in zip(supports, masks, strict=True))
    clear = (2 * ones != owners) | (owners == 0)
    assert (result[clear] == (2 * ones > owners)[clear]).all()
    assert not unpack_bits(method.result(method.init()).bits["mask"], D).any()


# Replies from a hostile device


def asked(method):
    """A server that knows client 0, and the support it has."""
    support = flags(5, 0.6)
    state = fold(method, method.init(), k0=first(method, support, flags(6)), k1=first(method, flags(7), flags(8)))
    return state, support


def read(method, state, payload, known, client=0):
    frame = pack(payload, digest=DIGEST, round_=2, known=known, codecs=method.codecs)
    turn = Turn(1, 2, 5, client)
    return read_reply(
        frame, method, method.broadcast(state, client), turn, method.recall(state, client), digest=DIGEST
    )


@every_return
@pytest.mark.parametrize("off", [-8, -1, 1, 8])
def test_a_mask_of_another_length_is_refused(returns, off):
    method = METHODS[returns]
    state, support = asked(method)
    n = int(support.sum()) + off
    with pytest.raises(WireError, match=f"'mask' has {n} elements"):
        read(method, state, Payload(bits={"mask": pack_bits(np.ones(n, bool))}), SideInfo((n,)))


@every_return
def test_other_forms_are_refused(returns):
    method = METHODS[returns]
    state, support = asked(method)
    mask = later(support, flags(1)).bits["mask"]
    n, whole = int(support.sum()), first(method, support, flags(1)).counts["first"]
    both = Payload(bits={"mask": mask}, counts={"first": whole})
    known = {"mask": SideInfo((n,)), "first": SideInfo((D,)), "x": SideInfo((D,))}
    for payload, message in [
        (both, "expected mask or first"),
        (Payload(), "holds nothing, expected mask or first"),
        (Payload(counts={"mask": Counts(np.zeros(n, np.uint32), 1)}), "came as counts"),
        (Payload(bits={"first": pack_bits(support)}), "came as bits"),
        (Payload(counts={"first": Counts(whole.values[:-1], 2)}), f"has {D - 1} elements"),
        (Payload(bits={"x": pack_bits(support)}), "unexpected field"),
        (Payload(dense={"mask": np.zeros(n, np.float32)}), "came as dense"),
    ]:
        with pytest.raises(WireError, match=message):
            read(method, state, payload, known | ({"first": SideInfo((D - 1,))} if "elements" in message else {}))


def test_a_mask_from_a_device_without_a_known_support_is_refused():
    method = METHODS["mean"]
    state, support = asked(method)
    payload = later(support, flags(1))
    with pytest.raises(WireError, match="unexpected field 'mask'"):
        read(method, state, payload, SideInfo((int(support.sum()),)), client=9)


@pytest.mark.parametrize("top", [0, 1, 3, 60, 2**32 - 1])
def test_a_first_reply_with_other_values_is_refused(top):
    method = METHODS["mean"]
    values = np.minimum(np.arange(D), top).astype(np.uint32)
    with pytest.raises(WireError, match=f"counts to {top}, expected 2"):
        method.check(method.init(), update(0, Payload(counts={"first": Counts(values, top)})))


@every_return
def test_an_empty_and_a_full_support_travel(returns):
    method = METHODS[returns]
    supports = {0: np.zeros(D, bool), 1: np.ones(D, bool), 2: at(0), 3: at(D - 1)}
    state = fold(method, method.init(), **{f"k{k}": first(method, s, flags(k)) for k, s in supports.items()})
    for k, support in supports.items():
        shared = method.recall(state, k)
        frame = pack(
            method.broadcast(state, k), digest=DIGEST, round_=1, known=method.heard(shared), codecs=method.codecs
        )
        got = read_broadcast(frame, method, shared, digest=DIGEST, round_=1)
        assert method.told(got, shared).size == support.sum()
        known = method.known(got, Turn(1, 1, 5, k), shared)
        payload = later(support, flags(9 + k))
        back = read(method, state, payload, known, client=k).payload
        assert (back.bits["mask"] == payload.bits["mask"]).all()
        method.aggregate(state, [update(k, back)])


def test_clients_have_numbers_up_to_64_bits():
    method, largest = METHODS["mean"], 2**64 - 1
    state = method.aggregate(method.init(), [update(largest, first(method, flags(1), flags(2)))])
    assert method.recall(state, largest)["support"].tolist() == pack_bits(flags(1)).tolist()
    assert method.recall(state, largest - 1) == {}
    assert method.recall(state, 0) == {}


# Pruning

SHAPES = ((6, 4), (5, 2, 3, 3), (7, 5), (3, 7))


@given(
    st.floats(0, 0.99),
    st.integers(0, 6),
    st.sampled_from(["weight", "neuron"]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_pruning_equals_a_plain_sort(prune, layers, by, values, seed):
    """Few different values, so that ties are common."""
    spec = MaskSpec(tuple("abcd"), SHAPES)
    importance = np.random.default_rng(seed).integers(0, values, spec.numel).astype(np.float32) / 4
    config = FedMaskConfig(prune=prune, prune_layers=layers, prune_by=by)
    expected = oracles.keep_largest(importance, SHAPES, prune, layers, by)
    assert keep_largest(importance, spec, config).tolist() == expected


def test_pruning_takes_the_smallest_of_the_last_layers_only():
    spec, rng = MaskSpec(tuple("abcd"), SHAPES), np.random.default_rng(0)
    importance = rng.random(spec.numel).astype(np.float32)
    parts = np.split(
        keep_largest(importance, spec, FedMaskConfig(prune=0.4, prune_by="neuron")), np.cumsum(spec.sizes)
    )
    assert parts[0].all()
    assert parts[1].all()
    rows = parts[2].reshape(7, 5)
    assert ((rows.sum(1) == 0) | (rows.sum(1) == 5)).all(), "whole neurons"
    assert (rows.sum(1) == 0).sum() == 2
    last = parts[3]
    assert (~last).sum() == 8
    assert importance[-21:][~last].max() < importance[-21:][last].min(), "the last layer by weight"
    assert keep_largest(importance, spec, FedMaskConfig(prune=0.0)).all()
    assert keep_largest(importance, spec, FedMaskConfig(prune_layers=0, prune=0.9)).all()
