"""The server half of FedWeIT: who is told which knowledge, and averages of columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from weit_replies import METHOD, at, reply, told
from weit_turns import ROUNDS, Device, begun, build, different, edited, folded, network, over_the_wire, play

from fedmask_flwr.aggregate import densify, sketch
from fedmask_flwr.methods import Turn, Update, weit_server
from fedmask_flwr.methods.weit_state import SKETCH


def test_nobody_is_told_its_own():
    state = folded(METHOD, at(METHOD, 0), {k: reply(client=k, finished=0) for k in range(3)})
    assert [told(METHOD, state, k) for k in range(4)] == [
        ((1, 2), (1, 2), (0,), False),
        ((0, 2), (0, 2), (0,), False),
        ((0, 1), (0, 1), (0,), False),
        ((0, 1, 2), (0, 1, 2), (), False),
    ]
    assert not list(METHOD.broadcast(state).counts), "the server itself is told no device's knowledge"


def test_only_new_entries_travel_and_what_was_lost_comes_again():
    devices = [Device(METHOD, k) for k in range(3)]
    state = begun(METHOD, play(METHOD, devices, METHOD.init(), ROUNDS, different))
    travelled = []
    for _ in range(2):
        travelled.append([told(METHOD, state, k)[1] for k in range(3)])
        state = begun(METHOD, folded(METHOD, state, {d.client: d.turn(state, d.client) for d in devices}))
        assert [d.held() for d in devices] == [[1, 2], [0, 2], [0, 1]]
    assert travelled == [[(1, 2), (0, 2), (0, 1)], [(), (), ()]]
    devices[0].memory.clear()
    seen = []
    for _ in range(2):
        use, new, came, _ = told(METHOD, state, 0)
        state = begun(METHOD, folded(METHOD, state, {0: devices[0].turn(state, 0)}))
        seen.append((use, new, came, devices[0].held()))
    assert seen == [((1, 2), (), (0,), []), ((1, 2), (1, 2), (0,), [1, 2])]
    assert METHOD.tasks(devices[0].memory) == (1,)


def test_more_entries_than_a_message_holds_come_over_several_rounds(monkeypatch):
    monkeypatch.setattr(weit_server, "SLOTS", 4)
    many, made = 11, 0.01 * vectors(METHOD, 12)
    state = folded(
        METHOD, at(METHOD, 0), {k: reply(client=k, finished=0, entry=made[k]) for k in range(1, many + 1)}
    )
    device, state = Device(METHOD, 0), replace(state, clock=5)
    counts = []
    for _ in range(4):
        assert len(told(METHOD, state, 0)[0]) == many
        counts.append(len(told(METHOD, state, 0)[1]))
        state = folded(METHOD, state, {0: device.turn(state, 0, steps=1)})
        assert device.memory["alpha"].shape == (len(device.held()), 3)
        assert device.memory["alpha"].any(1).all(), "attention is paid to each from the round it comes"
    assert counts == [4, 4, 3, 0]
    assert device.held() == list(range(many))


def test_attention_stays_with_its_entry():
    """Entries that come between others must not take over their attention or its moments."""
    state = folded(METHOD, at(METHOD, 0), {k: reply(client=k, finished=0) for k in (1, 2, 3)})
    device = Device(METHOD, 0)
    two = replace(state, clock=2, holds=np.array([[0, 1]], np.uint64))  # as if 1 had come: so it does not come
    two = folded(METHOD, two, {0: device.turn(two, 0)})
    assert device.held() == [0, 2]
    before = {n: device.memory[n].reshape(2, -1).copy() for n in ("alpha", "moments.alpha.exp_avg")}
    three = replace(two, clock=3)
    device.turn(three, 0)
    assert device.held() == [0, 1, 2]
    began = {n: device.began[n].reshape(3, -1) for n in before}
    for name, old in before.items():
        assert old.all()
        assert np.array_equal(began[name][[0, 2]], old)
        assert not began[name][1].any()


def vectors(method, n, seed=5):
    """Vectors that have little to do with each other."""
    return np.random.default_rng(seed).normal(size=(n, method.structure.numel))


def test_the_likest_entries_are_chosen_after_the_probes_and_stay():
    method = build(tasks=2, retrieve=2, probe_rounds=2)
    made = vectors(method, 5)
    state = at(method, 0)
    assert told(method, state, 9) == ((), (), (), False), "nothing to choose from: no sketch"
    state = folded(method, state, {k: reply(method, k, finished=0, entry=made[k]) for k in range(5)})
    state = folded(method, replace(state, task=1, clock=2), {9: reply(method, 9, task=1)})
    own = sketch((made[3] + 0.8 * made[1]).astype(np.float32), SKETCH, 0)
    story = []
    for clock, probe in ((3, own), (4, own), (5, None), (6, None)):
        use, *rest = told(method, state, 9)
        story.append((use, *rest))
        answer = reply(method, 9, task=1, holds=use, sketch=probe)
        state = folded(method, replace(state, clock=clock), {9: answer})
    assert story == [
        ((), (), (), True),
        ((), (), (), True),
        ((1, 3), (1, 3), (), False),
        ((1, 3), (), (), False),
    ]
    again = replace(state, task=2, clock=8)
    assert told(method, again, 9)[:2] == ((), ()) and told(method, again, 9)[3], "a new task is asked anew"
    state = folded(method, again, {9: reply(method, 9, task=2)})
    assert told(method, state, 9) == ((), (), (), True), "also once it has begun it"


def test_devices_sketch_only_when_asked_and_keep_their_choice():
    method = build(tasks=2, retrieve=1, probe_rounds=2)
    devices = [Device(method, k) for k in range(3)]
    state, story = method.init(), []
    for _ in range(2 * ROUNDS):
        state = begun(method, state)
        replies = {d.client: d.turn(state, different(d.client, state.task)) for d in devices}
        story.append([(replies[k].dense["sketch"].size, tuple(replies[k].counts["ids"].values)) for k in range(3)])
        state = folded(method, state, replies)
    assert all(row == [(0, ())] * 3 for row in story[:ROUNDS])
    assert all([size for size, _ in row] == [SKETCH] * 3 for row in story[ROUNDS : ROUNDS + 2])
    assert all([size for size, _ in row] == [0] * 3 for row in story[ROUNDS + 2 :])
    later = [[ids for _, ids in row] for row in story[ROUNDS + 2 :]]
    assert all(len(ids) == 1 for ids in later[0]) and later == [later[0]] * len(later)


@pytest.mark.parametrize(("retrieve", "use"), [(-1, 3), (0, 0), (3, 3), (4, 3)])
def test_without_a_choice_there_is_no_probe(retrieve, use):
    method = build(tasks=2, retrieve=retrieve)
    state = folded(method, at(method, 0), {k: reply(method, k, finished=0) for k in range(3)})
    ids, _, _, probe = told(method, replace(state, task=1), 9)
    assert (len(ids), probe) == (use, False)


def test_who_wants_to_be_private_never_sends_an_entry():
    devices = [Device(METHOD, 0, private=True), Device(METHOD, 1)]
    state = METHOD.init()
    for _ in range(2 * ROUNDS):
        state = begun(METHOD, state)
        replies = {d.client: d.turn(state, different(d.client, state.task), 1) for d in devices}
        assert replies[0].meta["finished"] == -1 and "where" not in replies[0].bits
        state = folded(METHOD, state, replies)
    assert (state.knowledge.tasks(0), state.knowledge.tasks(1)) == ((), (0, 1))
    assert devices[0].held() == [0], "it may still use what others give"


def test_who_is_no_longer_private_goes_on():
    """What it kept to itself then is not sent later."""
    device, state = Device(METHOD, 0, private=True), METHOD.init()
    state = play(METHOD, [device], state, ROUNDS + 1, different, steps=1)
    device.private = False
    for _ in range(ROUNDS - 1):
        state = begun(METHOD, state)
        reply = device.turn(state, 2, 1)
        assert reply.meta["finished"] == (1 if state.last else -1)
        state = folded(METHOD, state, {0: reply})
    assert METHOD.tasks(device.memory) == (0, 1)
    assert state.knowledge.tasks(0) == (1,)


def test_late_joiners_and_who_was_not_asked_get_what_they_missed():
    devices = [Device(METHOD, k) for k in range(3)]
    state = play(METHOD, devices[:2], METHOD.init(), ROUNDS, different, steps=1)
    state = play(METHOD, devices[1:2], state, 2, different, steps=1)  # 0 is not asked at the switch
    assert devices[1].held() == [0]
    state = play(METHOD, devices, state, 1, different, steps=1)
    assert [d.held() for d in devices] == [[1], [0], [0, 1]]
    assert METHOD.tasks(devices[0].memory) == (0, 1) and METHOD.tasks(devices[2].memory) == (1,)


def test_a_finished_task_whose_reply_was_lost_is_sent_later():
    """As it was when the task ended, and until it came."""
    devices, sent = [Device(METHOD, k) for k in range(2)], []
    state = play(METHOD, devices, METHOD.init(), ROUNDS, different, lost={(ROUNDS, 0), (ROUNDS + 1, 0)})
    ended = devices[0].memory["A.0"].copy()
    assert state.knowledge.tasks(0) == ()
    for _ in range(3):
        state = begun(METHOD, state)
        answer = devices[0].turn(state, 2)
        sent.append(answer.meta["finished"])
        lost = len(sent) == 1
        state = folded(METHOD, state, {1: devices[1].turn(state, 3)} | ({} if lost else {0: answer}))
    assert sent == [0, 0, -1]
    where, values = state.knowledge.entry(1)
    keep = np.abs(ended) > METHOD.config.prune_below
    assert np.array_equal(where, np.packbits(keep, bitorder="little"))
    assert np.array_equal(values, ended[keep])
    assert state.knowledge.tasks(0) == (0,)


def test_an_entry_sent_late_is_what_the_task_ended_with():
    """Two tasks later A has followed B; what travels is A as it was."""
    method = build(tasks=3, client_sparsity=0.0, prune_below=0.0)
    device, state, ended, sent = Device(method, 0), method.init(), None, []
    for _ in range(12):
        state = begun(method, state, 12)
        reply = device.turn(state, different(0, state.task))
        if state.clock == 4:
            ended = device.memory["A.0"].copy()
        if reply.meta["finished"] == 0:
            sent.append(densify(reply.bits["where"], reply.dense["values"], method.structure.numel))
        if state.clock not in range(4, 10):  # its replies are lost until the third task
            state = folded(method, state, {0: reply})
    assert len(sent) == 7
    assert all((one == ended).all() for one in sent)
    assert (device.memory["A.0"] != ended).any()
    assert not any(name.startswith("end.") for name in device.memory if name != "end.1")


def test_the_base_keeps_its_budget():
    method = build(tasks=2, kb_budget=0.02)
    state = at(method, 0)
    for clock in range(12):
        answers = {k: reply(method, k, seed=clock, task=clock, finished=clock) for k in range(2)}
        state = folded(method, replace(state, task=clock, clock=clock), answers)
        assert state.knowledge.nbytes <= 20_000
    assert state.knowledge.tasks(0) == tuple(range(12)), "what was let go is not asked for again"
    assert 0 < len(state.knowledge) < 24


# Averages


@settings(max_examples=30)
@given(st.permutations(range(5)), st.booleans(), st.sampled_from(["fixed", "released"]), st.integers(0, 99))
def test_order_does_not_matter(order, weighted, compat, seed):
    method = build(tasks=2, weighted=weighted, compat=compat)
    updates = [Update(k, reply(method, k, seed, finished=0), float(1 + k), 0.0) for k in range(5)]
    before = method.aggregate(at(method, 0), [Update(7, reply(method, 7, seed), 2.0, 0.0)])
    forward = method.aggregate(before, iter(updates))
    other = method.aggregate(before, iter([updates[i] for i in order]))
    assert np.allclose(forward.base, other.base, rtol=1e-6, atol=1e-7)
    assert np.array_equal(forward.sent, other.sent)
    entries = [
        {
            (c, t): tuple(a.tobytes() for a in state.knowledge.entry(i))
            for i, c, t in state.knowledge.owners.tolist()
        }
        for state in (forward, other)
    ]
    assert entries[0] == entries[1] and len(entries[0]) == 5


@pytest.mark.parametrize("compat", ["fixed", "released"])
def test_columns_are_averaged_over_those_that_sent_them(compat):
    """Weighted by examples, where so set; unsent ones stay, or become 0 in the released way."""
    method = build(tasks=2, weighted=True, compat=compat)
    column = method.structure.column.numpy()
    sent = np.zeros((3, method.structure.columns), bool)
    sent[0, :10], sent[1, 5:20], sent[2, 30:] = True, True, True

    def one(client, value):
        found = reply(method, client)
        return edited(
            found,
            bits={"columns": np.packbits(sent[client], bitorder="little")},
            dense={"base": np.full(int(sent[client][column].sum()), value, np.float32)},
        )

    state = method.aggregate(at(method, 0), [Update(2, one(2, 8.0), 1.0, 0.0)])
    state = method.aggregate(state, [Update(0, one(0, 1.0), 3.0, 0.0), Update(1, one(1, 5.0), 1.0, 0.0)])
    old = 8.0 if compat == "fixed" else 0.0
    per_column = np.select(
        [np.arange(sent.shape[1]) < k for k in (5, 10, 20, 30)], [1.0, (3 * 1 + 5) / 4, 5.0, 0.0], default=old
    )
    assert np.allclose(state.base, per_column[column])
    assert np.array_equal(state.sent.astype(bool), sent.any(0) | (compat == "released"))
    got = over_the_wire(method, method.broadcast(state, 4), [method.down({})], method.heard({}), 2)[0]
    assert np.array_equal(got.dense["base"], state.base[state.sent.astype(bool)[column]])
    device = Device(method, 4)
    device.turn(replace(state, clock=3), 0, steps=0)
    taken = (sent.any(0) | (compat == "released"))[column]
    assert np.array_equal(device.began["base"], np.where(taken, state.base, method.start))


def test_tasks_share_the_rounds():
    method, state, story = build(tasks=3), None, []
    state = method.init()
    for round_ in range(1, 12):
        state = method.advance(state, Turn(1, round_, 11, 0))
        story.append((state.task, state.last))
    assert [task for task, _ in story] == [0] * 4 + [1] * 4 + [2] * 3
    assert [r for r, (_, last) in enumerate(story, 1) if last] == [4, 8, 11]


def test_figures_say_who_used_what():
    devices = [Device(METHOD, k) for k in range(2)]
    state = play(METHOD, devices, METHOD.init(), ROUNDS + 1, different)
    figures = METHOD.figures(state)
    assert figures["task"] == 1 and figures["kb_entries"] == 2 and figures["kb_bytes"] == state.knowledge.nbytes
    alpha = [round(float(d.memory["alpha"].astype(np.float64).mean()), 6) for d in devices]
    assert figures["attention"] == [[0, 1, 1, 0, alpha[0]], [1, 1, 0, 0, alpha[1]]]
    assert METHOD.figures(begun(METHOD, state))["attention"] == [], "of this round alone"
    assert tiny.equal(METHOD.aggregate(state, iter(())), state)
    assert np.array_equal(METHOD.result(state).dense["base"], state.base)
    fresh = METHOD.result(METHOD.init()).dense["base"]
    assert np.array_equal(fresh, METHOD.structure.gather(METHOD.structure.params(network())).numpy())
