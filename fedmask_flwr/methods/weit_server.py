"""The server half of the FedWeIT family: columns of B are averaged, finished tasks' A kept and handed on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedmask_flwr.aggregate import KnowledgeBase
from fedmask_flwr.masks import MaskSpec, Mode, Structure
from fedmask_flwr.wire import Payload, SideInfo, WireError, popcount

from .base import Fields, Known, Memory, Method, MethodConfig, Turn, Update
from .dense import float_entries, read_tensors
from .layers import last_layers, plain
from .recollection import Floats, Ids
from .weit_state import FOUND, SKETCH, WeitConfig, WeitState, counts_of, entries_of, task_of, with_rows

SLOTS = 64  # entries of knowledge in one message; what is more follows in the next round
LARGEST = 1e30  # of a weight: sums over clients and tasks must stay finite
Flags = npt.NDArray[np.bool_]


class WeitServer(Method[WeitState], ABC):
    """What travels, and the server half."""

    State = WeitState
    Config: ClassVar[type[MethodConfig]] = WeitConfig
    personal = True
    exact: ClassVar[bool] = True  # a column's bit says how many values follow
    modes: ClassVar[tuple[Mode, ...]] = ()

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        density = hasattr(model, "nll")
        layers = (0 if density else 1) if self.config.local_layers < 0 else self.config.local_layers
        weights = {plain(name) for name, p in model.named_parameters() if p.ndim >= 2}
        head = last_layers(model, layers) & weights if layers else frozenset()
        matters = {name: where for name, where in (self.structural(model) or {}).items() if name not in head}
        self.structure = Structure.of(model, matters, head)
        self.kinds = frozenset(self.structure.names)
        self.column = self.structure.column.cpu().numpy()
        self.start = self.structure.gather(self.structure.params(model)).cpu().numpy()
        self.local_start = read_tensors(self.local(model))

    @staticmethod
    @abstractmethod
    def structural(model: nn.Module) -> Mapping[str, Tensor] | None:
        """Where each weight of ``model`` can ever matter, by name; None: everywhere."""

    @property
    def numel(self) -> int:
        """Every float of the model's state dict."""
        return self.floats

    def local(self, model: nn.Module) -> Iterator[Tensor]:
        """The floats that stay on the device and are each task's own: biases, norms, heads."""
        return (t for name, t in float_entries(model) if plain(name) not in self.kinds)

    # What travels

    def down(self, shared: Memory) -> Fields:
        """Columns of theta_G, ids to use, ids of own tasks that came, and entries that the device lacks."""
        n, c = self.structure.numel, self.structure.columns
        ids: Fields = {name: ("counts", range(2**20)) for name in ("use", "new", "came")}
        slots: dict[str, tuple[Any, Any]] = {}
        for i in range(SLOTS):
            slots |= {f"where.{i}": ("bits", n), f"values.{i}": ("dense", range(n + 1))}
        return {"columns": ("bits", c), "base": ("dense", range(n + 1)), **ids, **slots}

    def up(self, got: Payload, shared: Memory) -> tuple[Fields, ...]:
        """Columns of B, ids held, attention, a sketch where it was asked for; a finished task's A, or not."""
        n, c, kinds = self.structure.numel, self.structure.columns, len(self.structure.names)
        form: Fields = {
            "columns": ("bits", c),
            "base": ("dense", range(n + 1)),
            "holds": ("counts", range(2**20)),
            "ids": ("counts", range(2**20)),
            "alpha": ("dense", range(0, 2**20 * kinds, kinds)),
            "sketch": ("dense", range(0, SKETCH + 1, SKETCH)),
        }
        return form, {**form, "where": ("bits", n), "values": ("dense", range(n + 1))}

    def heard(self, shared: Memory) -> Known:
        """Kinds: of the columns, and of the packed values."""
        packed = SideInfo(self.structure.sizes)
        slots = {f"where.{i}": packed for i in range(SLOTS)}
        return {"columns": SideInfo(self.structure.column_sizes), "where": packed, **slots}

    def known(self, got: Payload, turn: Turn, shared: Memory) -> Known:
        """The same."""
        return self.heard(shared)

    # Server

    def init(self) -> WeitState:
        """Nothing heard of anybody."""
        none = np.zeros((0, 2), np.uint64)
        return WeitState(
            base=np.zeros(0, np.float32),
            sent=np.zeros(self.structure.columns, np.uint8),
            task=FOUND if self.config.tasks == 0 else 0,
            last=0,
            clock=0,
            contacts=np.zeros((0, 3), np.uint64),
            holds=none,
            chosen=none,
            knowledge=KnowledgeBase.empty(self.structure.numel, len(self.structure.names), SKETCH),
        )

    def advance(self, state: WeitState, turn: Turn) -> WeitState:
        """Tell the task: each has as many rounds as the others, the last ones one more where it does not divide."""
        tasks = self.config.tasks
        if not tasks:
            return replace(state, clock=turn.round)
        task, after = ((r * tasks) // turn.rounds for r in (turn.round - 1, turn.round))
        return replace(state, task=task, last=int(after > task), clock=turn.round)

    def inquire(self, state: WeitState, client: int) -> Payload:
        """A device evaluates what it has: nothing but the task."""
        return Payload(meta={"task": state.task, "last": state.last})

    def broadcast(self, state: WeitState, client: int | None = None) -> Payload:
        """theta_G to all; to a client also what it may use of others' tasks, where it does not hold that yet."""
        bits, dense = {}, {}
        if state.base.size:
            flags = state.sent.astype(bool)
            bits["columns"], dense["base"] = np.packbits(flags, bitorder="little"), state.base[flags[self.column]]
        meta: dict[str, Any] = {"task": state.task, "last": state.last, "probe": 0}
        if client is None:
            return Payload(bits=bits, dense=dense, meta=meta)
        use, asked = self._useful(state, client)
        meta["probe"] = int(asked)
        rows = state.contacts[state.contacts[:, 0] == np.uint64(client)]
        if state.task == FOUND and len(rows):
            meta["at"] = int(rows[0, 1])
        new = np.setdiff1d(use, entries_of(state.holds, client))[:SLOTS]
        for slot, i in enumerate(new):
            bits[f"where.{slot}"], dense[f"values.{slot}"] = state.knowledge.entry(int(i))
        came = np.array(state.knowledge.tasks(client), np.int64)
        ids = {name: counts_of(value) for name, value in (("use", use), ("new", new), ("came", came)) if value.size}
        return Payload(bits=bits, dense=dense, counts=ids, meta=meta)

    def _useful(self, state: WeitState, client: int) -> tuple[Ids, bool]:
        """Entries that a client may use now, and whether its own A must first say which are like it."""
        k, found = self.config.retrieve, state.knowledge.candidates(client)
        if k < 0 or len(found) <= k:
            return found, False
        if not self._present(state, client):
            return found[:0], k > 0
        chosen = np.intersect1d(found, entries_of(state.chosen, client))
        # Until it is chosen anew it goes on with what it holds: attention that was learned is not thrown away.
        use = chosen if len(chosen) else np.intersect1d(found, entries_of(state.holds, client))[:k]
        return use, len(chosen) < k

    def _present(self, state: WeitState, client: int) -> bool:
        """Whether the client, when last heard, was at the task that it is now told."""
        rows = state.contacts[state.contacts[:, 0] == np.uint64(client)]
        return bool(len(rows)) and state.task in (FOUND, int(rows[0, 1]))

    def check(self, state: WeitState, update: Update) -> None:
        """Refuse a reply of another task, and one whose parts do not fit each other."""
        p, meta = update.payload, update.payload.meta
        task, finished = (task_of(meta.get(name), name, floor) for name, floor in (("task", 0), ("finished", -1)))
        if state.task not in (FOUND, task):
            raise WireError(f"the reply is of task {task}, this round is of task {state.task}: a stale answer")
        rows = state.contacts[state.contacts[:, 0] == np.uint64(update.client)]
        if len(rows) and task < int(rows[0, 1]):
            raise WireError(f"the reply is of task {task}, but the client was at task {rows[0, 1]} before")
        if finished > task:
            raise WireError(f"task {finished} cannot be finished in task {task}")
        size = int(self.flags(p)[self.column].sum())
        if not (np.abs(p.dense["base"]) <= LARGEST).all():
            raise WireError(f"a weight above {LARGEST:g}: check the training (learning rate, loss)")
        if p.dense["base"].size != size:
            raise WireError(f"{p.dense['base'].size} values for columns of {size}")
        if ("where" in p.bits) != (finished >= 0):
            raise WireError("what a finished task learned, and which task that was, come together")
        if "where" in p.bits and popcount(p.bits["where"]) != p.dense["values"].size:
            raise WireError(f"{p.dense['values'].size} values for {popcount(p.bits['where'])} positions")
        alone = KnowledgeBase.empty(self.structure.numel, len(self.structure.names), SKETCH)
        try:
            self._attend(state, state.knowledge, update).nearest(update.client, _sketch(p), 1)
            alone.extend(_entry(update), state.clock)
        except ValueError as error:
            raise WireError(str(error)) from error

    def _attend(self, state: WeitState, knowledge: KnowledgeBase, update: Update) -> KnowledgeBase:
        """Take up how much attention a reply's task gives to which entry."""
        ids = update.payload.counts["ids"].values.astype(np.int64)
        alpha = update.payload.dense["alpha"].reshape(-1, len(self.structure.names))
        return knowledge.attend(update.client, int(update.payload.meta["task"]), ids, alpha, state.clock)

    def aggregate(self, state: WeitState, updates: Iterable[Update]) -> WeitState:
        """theta_G[:, o] = sum_c w_c B_c[:, o] / sum_c w_c over the clients that sent column o; others stay."""
        sums, weights = np.zeros(self.structure.numel), np.zeros(self.structure.columns)
        contacts, holds, chosen, knowledge = state.contacts, state.holds, state.chosen, state.knowledge
        heard, finished = False, []
        for update in updates:
            heard = True
            client, p = update.client, update.payload
            flags, weight = self.flags(p), update.weight if self.config.weighted else 1.0
            sums[flags[self.column]] += weight * p.dense["base"].astype(np.float64)
            weights[flags] += weight
            knowledge = self._attend(state, knowledge, update)
            finished += _entry(update)
            row = contacts[contacts[:, 0] == np.uint64(client)]
            task, same = int(p.meta["task"]), len(row) and int(row[0, 1]) == int(p.meta["task"])
            probes = (int(row[0, 2]) if same else 0) + bool(p.dense["sketch"].size)
            contacts = with_rows(contacts, client, [[task, probes]])
            held = np.intersect1d(p.counts["holds"].values.astype(np.int64), knowledge.ids)
            holds = with_rows(holds, client, held[:, None])
            if not same:
                chosen = with_rows(chosen, client, [])
            if p.dense["sketch"].size and probes >= self.config.probe_rounds:
                near = state.knowledge.nearest(client, p.dense["sketch"], self.config.retrieve)
                chosen = with_rows(chosen, client, near[:, None])
        if not heard:
            return state
        came = weights > 0
        base = state.base if state.base.size else np.zeros(self.structure.numel, np.float32)
        base = base if self.config.compat == "fixed" else base * came[self.column]
        mean = sums / np.maximum(weights, 1e-30)[self.column]
        return WeitState(
            base=np.where(came[self.column], mean, base).astype(np.float32),
            sent=(came | state.sent.astype(bool) | (self.config.compat == "released")).astype(np.uint8),
            task=state.task,
            last=state.last,
            clock=state.clock,
            contacts=contacts,
            holds=holds,
            chosen=chosen,
            knowledge=knowledge.extend(finished, state.clock).fit(int(self.config.kb_budget * 1e6), state.clock),
        )

    def flags(self, payload: Payload) -> Flags:
        """Columns that a payload holds, (columns,)."""
        raw = np.unpackbits(payload.bits["columns"], count=self.structure.columns, bitorder="little")
        return raw.astype(bool)

    def result(self, state: WeitState) -> Payload:
        """theta_G, (n,): what all devices share."""
        return Payload(dense={"base": state.base if state.base.size else self.start})

    def figures(self, state: WeitState) -> Mapping[str, Any]:
        """The knowledge base, and who used it this round: rows [client, task, owner, its task, alpha]."""
        rows = [[*r[:4], round(r.alpha, 6)] for r in state.knowledge.attention() if r.clock == state.clock]
        size = {"kb_entries": len(state.knowledge), "kb_bytes": state.knowledge.nbytes}
        return {"task": state.task, **size, "attention": rows}


def _entry(update: Update) -> list[tuple[int, int, npt.NDArray[np.uint8], Floats]]:
    """The finished task that a reply brings, as ``KnowledgeBase.extend`` takes it; [] where it brings none."""
    p = update.payload
    if "where" not in p.bits:
        return []
    return [(update.client, int(p.meta["finished"]), p.bits["where"], p.dense["values"])]


def _sketch(payload: Payload) -> Floats:
    return payload.dense["sketch"] if payload.dense["sketch"].size else np.zeros(SKETCH, np.float32)
