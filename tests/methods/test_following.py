"""A device that is told less ends with exactly the server's counts, whatever happens to it and to messages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from federation import network
from following_fleet import ROUNDS, Fleet, kinds, same, some

from fedmask_flwr.checkpoint import load_state, save_state
from fedmask_flwr.masks import thresholds
from fedmask_flwr.methods import Training, Turn
from fedmask_flwr.methods.following import memory_of
from fedmask_flwr.methods.klms import Klms
from fedmask_flwr.methods.trail import REPLAYS
from fedmask_flwr.wire import Counts, Frame, Payload, WireError

METHODS = {
    "fedpm": {"method": "fedpm"},
    "deltamask": {"method": "deltamask"},
    "klms": {"method": "klms", "target_bpp": 0.2},
}
every_method = pytest.mark.parametrize("told", METHODS.values(), ids=METHODS)
LOST = "does not hold the counts of round"
OTHER = "do not add up to the server's counts"


def equal(a, b):
    """Both servers are in the same state but for how it is told."""
    return np.array_equal(a.state.ones, b.state.ones) and (a.state.total, a.state.age) == (
        b.state.total,
        b.state.age,
    )


def eight(way, told, reset):
    """Two to four of five devices at random, some replies lost: what each is told is compared in ``play``."""
    fleet, states = Fleet(**told, downlink=way, reset=reset), []
    for number in range(1, 9):
        assert fleet.play(some(number, seed=reset), {number % 5} if number in (3, 6) else set()) == {}
        states.append((fleet.state.ones.tobytes(), fleet.state.total, fleet.state.age))
    return fleet, states


@cache
def plain(name, reset):
    return eight("whole", METHODS[name], reset)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reset", [1, 3])
@pytest.mark.parametrize("way", ["votes", "relay"])
def test_every_device_ends_with_the_server_s_counts(name, way, reset):
    whole, states = plain(name, reset)
    fleet, found = eight(way, METHODS[name], reset)
    assert found == states
    assert set(whole.said) == {"", "ones"}
    assert fleet.down <= whole.down
    if reset == 3 and (way == "votes" or name != "fedpm"):
        assert way in fleet.said
        assert fleet.down < whole.down


def test_relays_of_several_rounds_and_votes_are_both_told():
    """Who was away is told all rounds since, with a new beginning in between."""
    fleet = Fleet("deltamask", downlink="relay", reset=2)
    for present in ([0, 1, 2], [0, 1], [0, 1], [0, 2], [0, 1, 2]):
        assert fleet.play(present) == {}
    assert fleet.said[3:5] == ["relay"] * 2
    assert fleet.said[8] == "relay", "client 2 missed two rounds"
    assert fleet.state.trail.base(3) is None
    votes = Fleet("deltamask", downlink="votes", reset=4)
    for present in ([0, 1, 2], [0, 1], [0, 1, 2]):
        assert votes.play(present) == {}
    assert votes.said == ["", "", "", "ones", "ones", "votes", "votes", "ones"], "the first votes are the counts"


def test_everyone_is_told_by_what_it_holds():
    """Equal devices get one and the same payload: it is coded once; a newcomer and the server get the counts."""
    fleet = Fleet("deltamask", downlink="relay")
    fleet.play([0, 1, 2])
    fleet.play([0, 1])
    server, state = fleet.server, fleet.state
    assert server.broadcast(state, 0) is server.broadcast(state, 1) is not server.broadcast(state, 2)
    assert server.broadcast(state, 3) is server.broadcast(state, 4)
    for payload in (server.broadcast(state, 3), server.broadcast(state), server.understood(state, 0)):
        same(payload, server.understood(state, 0))
    assert set(server.recall(state, 0)) == {"ones", "head"}
    assert server.recall(state, 2) == server.recall(state, 3) == {}


@every_method
@pytest.mark.parametrize("way", ["votes", "relay"])
def test_a_lost_memory_costs_one_round(told, way):
    """The device says so, is told everything next time, and follows again."""
    fleet = Fleet(**told, downlink=way, reset=4)
    for _ in range(2):
        assert fleet.play([0, 1, 2]) == {}
    fleet.memory[1] = {}
    failed = fleet.play([0, 1, 2])
    assert list(failed) == [1]
    assert isinstance(failed[1], WireError)
    assert LOST in str(failed[1])
    assert "in its next round" in str(failed[1])
    assert fleet.state.trail.base(1) is None
    assert kinds(fleet.frame(1)) == {"ones"}
    assert fleet.play([0, 1, 2]) == fleet.play([0, 1, 2]) == {}
    assert fleet.state.trail.base(1) == fleet.round


def test_an_older_memory_is_not_followed_from():
    """A disk that was restored from a backup."""
    fleet = Fleet("deltamask", downlink="relay", reset=4)
    fleet.play([0, 1])
    old = dict(fleet.memory[0])
    fleet.play([0, 1])
    fleet.memory[0] = old
    assert LOST in str(fleet.play([0, 1])[0])


def brought(way):
    """A fleet in its third round, and the message that its client 0 gets."""
    fleet = Fleet("deltamask", downlink=way, reset=4)
    fleet.play([0, 1, 2])
    fleet.play([0, 1, 2])
    fleet.round += 1
    fleet.state = fleet.server.advance(fleet.state, fleet.turn(0))
    payload, memory = fleet.server.broadcast(fleet.state, 0), fleet.memory[0]
    assert set(payload.counts) == {way}
    return fleet, payload, memory


def changed(counts, at, by):
    values = counts.values.copy()
    values[at] = (int(values[at]) + by) % (counts.top + 1)
    return Counts(values, counts.top)


@pytest.mark.parametrize("way", ["votes", "relay"])
def test_what_does_not_add_up_is_refused(way):
    """Any byte of what came, the checksum, what the device holds, and whose turn it is."""
    fleet, payload, memory = brought(way)
    turn, device, counts = fleet.turn(0), fleet.device, payload.counts[way]
    same(device.complete(payload, turn, memory), fleet.server.broadcast(fleet.state))
    rng = np.random.default_rng(1)
    for at in rng.permutation(counts.values.size)[:60]:
        tampered = replace(payload, counts={way: changed(counts, at, int(rng.integers(1, counts.top + 1)))})
        with pytest.raises(WireError, match=OTHER):
            device.complete(tampered, turn, memory)
    for meta in ({"check": payload.meta["check"] ^ 1}, {"check": "no"}):
        with pytest.raises(WireError, match=OTHER):
            device.complete(replace(payload, meta={**payload.meta, **meta}), turn, memory)
    with pytest.raises(WireError, match=OTHER):
        device.complete(replace(payload, meta={"from": payload.meta["from"]}), turn, memory)
    for wrong in ({"ones": memory["ones"] ^ 1}, {"head": memory["head"] + [0, 1]}):
        with pytest.raises(WireError, match=OTHER):
            device.complete(payload, turn, {**memory, **wrong})
    for meta in ({"from": 7}, {"from": "1"}):
        with pytest.raises(WireError, match=LOST):
            device.complete(replace(payload, meta={**payload.meta, **meta}), turn, memory)
    with pytest.raises(WireError, match=LOST):
        device.complete(replace(payload, counts={}), turn, memory)
    with pytest.raises(WireError, match=OTHER):
        device.complete(replace(payload, counts={way: Counts(counts.values, 2**32 - 1)}), turn, memory) if (
            way == "votes"
        ) else device.complete(payload, replace(turn, seed=2), memory)


def test_a_relay_is_never_longer_than_counts():
    """The frame's number of elements is refused before anything of that size is allocated."""
    fleet, _, memory = brought("relay")
    kind, sizes = fleet.device.down(memory)["relay"]
    assert (kind, sizes.start, sizes[-1]) == ("counts", 1, 4 * fleet.server.numel + 256)
    frame = Frame.parse(fleet.frame(0))
    (field,) = frame.fields
    huge = replace(frame, fields=(replace(field, numel=2**31 - 1, body=b"\xff\x01\x00\x00"),))
    with pytest.raises(WireError, match="has 2147483647 elements, expected 1 to"):
        fleet.hear(0, huge.to_bytes())


def test_long_replies_are_not_relayed():
    """More than counts can take: what is kept of a round is bounded, however many devices reply."""
    fleet = Fleet("fedpm", downlink="relay", reset=4)
    fleet.play([0, 1, 2])
    server, state = fleet.server, server_state(fleet)
    reply = fleet.read(0, fleet.train(0, fleet.hear(0, fleet.frame(0))))
    many = [replace(reply, client=k, fields=reply.fields * 40) for k in range(3)]
    assert server.aggregate(state, many).trail.relay.size == 0
    assert server.aggregate(state, many).trail.since(2) is None


def test_many_replies_are_not_relayed():
    """Every device would decode every other one's: what that costs is bounded, however short they are."""
    fleet = Fleet("klms", target_bpp=0.2, downlink="relay", reset=4)
    fleet.play([0, 1, 2])
    server, state = fleet.server, server_state(fleet)
    reply = fleet.read(0, fleet.train(0, fleet.hear(0, fleet.frame(0))))
    for replies, kept in ((REPLAYS, True), (REPLAYS + 1, False)):
        many = [replace(reply, client=k, fields=reply.fields[:1]) for k in range(replies)]
        short = [replace(u, fields=(replace(u.fields[0], body=b""),)) for u in many]
        trail = server.aggregate(state, short).trail
        assert bool(trail.relay.size) == kept
        assert (trail.since(state.trail.now) is None) != kept


def server_state(fleet):
    fleet.round += 1
    fleet.state = fleet.server.advance(fleet.state, fleet.turn(0))
    return fleet.state


@pytest.mark.parametrize("way", ["votes", "relay"])
def test_lossy_codecs_are_told_whole(way):
    """Their flips come off theta, which whoever follows could not repeat; nothing is relayed later either."""
    fleet = Fleet("deltamask", downlink=way, codec="fuse8", kappa=1.0, kappa_min=1.0, reset=2)
    whole = Fleet("deltamask", codec="fuse8", kappa=1.0, kappa_min=1.0, reset=2)
    for number in range(1, 5):
        assert fleet.play(some(number)) == whole.play(some(number)) == {}
        assert equal(fleet, whole)
        assert fleet.state.flips == whole.state.flips
    assert set(fleet.said) == {"", "ones"}
    assert fleet.state.trail.relay.size == 0
    fleet.codec = "auto"  # such as where no filter could be built
    for _ in range(3):
        assert fleet.play(range(5)) == {}
    assert way in fleet.said


@pytest.mark.parametrize(("name", "way"), [("fedpm", "votes"), ("deltamask", "relay"), ("klms", "relay")])
def test_a_restored_state_goes_on_being_followed(name, way, tmp_path):
    """The server's next life says the same, byte for byte."""
    told = METHODS[name]
    fleet, twin = (Fleet(**told, downlink=way, reset=3) for _ in range(2))
    for number in range(1, 5):
        assert fleet.play(some(number)) == twin.play(some(number)) == {}
        save_state(tmp_path / "state", twin.state, {})
        twin.server = Fleet(**told, downlink=way, reset=3).server
        twin.state = load_state(tmp_path / "state", twin.server.State)[0]
        assert equal(fleet, twin)
        assert [fleet.frame(k) for k in range(5)] == [twin.frame(k) for k in range(5)]


def test_a_server_that_is_set_back_is_answered_from_the_older_memory():
    """Devices had trained the next round already: their older generation is what the server means."""
    fleet = Fleet("klms", downlink="relay", target_bpp=0.2)
    fleet.play([0, 1, 2])
    fleet.play([0, 1, 2])
    before = fleet.state, {k: dict(v) for k, v in fleet.memory.items()}, fleet.round
    fleet.play([0, 1, 2])
    (fleet.state, fleet.memory, fleet.round), after = before, fleet.state
    assert fleet.play([0, 1, 2]) == {}
    assert np.array_equal(fleet.state.ones, after.ones)


def test_the_memory_is_as_small_as_the_votes_allow():
    for total, dtype in ((0, np.uint8), (255, np.uint8), (256, np.uint16), (70_000, np.uint32)):
        memory = memory_of(np.full(3, total, np.uint32), total, 9)
        assert memory["ones"].dtype == dtype
        assert memory["ones"].tolist() == [total] * 3
        assert memory["head"].tolist() == [9, total]


def test_whole_asks_nothing_of_anyone():
    """No client numbers, no memory, the plain codec, and no trail."""
    fleet = Fleet("deltamask")
    fleet.play([0, 1, 2])
    assert not fleet.server.personal
    assert fleet.server.codecs["counts"] == "counts"
    assert fleet.memory[0] == {}
    assert fleet.state.trail.now == fleet.state.trail.held.size == fleet.state.trail.before.size == 0
    assert fleet.server.recall(fleet.state, 0) == {}
    assert fleet.server.missed(fleet.state, [0]) is fleet.state


def test_a_private_device_is_not_relayed():
    """It takes part where only sums are shown."""
    for way in ("whole", "votes", "relay"):
        method = Fleet("deltamask", downlink=way).device
        model, turn = network(Fleet("deltamask").make), Turn(1, 1, 5, 0, private=True)
        if way == "relay":
            with pytest.raises(ValueError, match=r'this device is private.*use "votes"'):
                method.begin(Payload(), model, Training(), turn, {})
        else:
            method.begin(Payload(), model, Training(), turn, {})


def test_an_unheard_round_changes_only_who_is_followed():
    fleet = Fleet("deltamask", downlink="relay")
    fleet.play([0, 1, 2])
    ones = fleet.state.ones
    fleet.play([0, 1], lost={0, 1})
    assert fleet.state.ones is ones
    assert [fleet.state.trail.base(k) for k in range(3)] == [None, None, 1]
    assert fleet.play([0, 1, 2]) == {}
    assert fleet.said[-3:] == ["ones", "ones", "relay"]


@pytest.mark.parametrize("name", ["deltastep", "drawstep"])
def test_a_run_that_goes_on_for_longer_is_not_replayed(name):
    """The step of a round depends on how many there are, which nobody wrote down: votes are told, and followed."""
    fleet, whole = Fleet(name, downlink="relay"), Fleet(name)
    for _ in range(3):
        assert fleet.play(range(5)) == whole.play(range(5)) == {}
    assert "relay" in fleet.said
    for one in (fleet, whole):
        one.turn = lambda client, one=one: Turn(1, one.round, 2 * ROUNDS, client)
    for number in range(4, 7):
        fleet.said.clear()
        assert fleet.play(range(5)) == whole.play(range(5)) == {}
        assert equal(fleet, whole)
        assert ("relay" in fleet.said) == (number > 4)


@pytest.mark.parametrize(("name", "attribute"), [("klms", "_cuts"), ("deltastep", "_last")])
def test_nothing_as_long_as_the_mask_is_held_between_rounds(name, attribute):
    fleet = Fleet(name, downlink="relay" if name == "klms" else "whole")
    fleet.play(range(5))
    fleet.play(range(5))
    held = getattr(fleet.server, attribute)
    assert held[1].size == 0 if name == "klms" else not hasattr(held, "guess")


@pytest.mark.parametrize("way", ["whole", "votes", "relay"])
def test_thresholds_of_a_round_are_computed_once(way, monkeypatch):
    """Whatever each device holds, what it understands is one and the same."""
    fleet, of_theta, made = Fleet("klms", downlink=way), Klms.of_theta, []

    def counted(self, got, function):
        if self is fleet.server and function is thresholds:
            made.append(got)
        return of_theta(self, got, function)

    monkeypatch.setattr(Klms, "of_theta", counted)
    for number in range(1, 4):
        fleet.play(range(5))
        # A relay is decoded by devices alone; the first of each round's replies pays.
        assert len(made) == number
