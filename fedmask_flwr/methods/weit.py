"""What FedWeIT and CONFEDMADE share: theta = B*sigma(m) + A + sum_n alpha_n KB_n, task after task.

Every device keeps its own m, A, alpha and biases for every task. It sends columns of B, which the server averages,
and each finished task's A, which the server keeps in a knowledge base and hands to the devices that it may help.
Where a network has a structural mask (``structural``), values that can never matter are not regularised, sent or
kept.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import sketch, sparsify
from fedmask_flwr.masks import Parts, WeitOptimizer, derive
from fedmask_flwr.wire import Payload, WireError, popcount

from .base import Memory, Training, Turn, View
from .dense import LEARNING_RATE, read_tensors, write_tensors
from .drift import Drift
from .layers import plain
from .recollection import Floats, Ids, Recollection
from .weit_server import Flags, WeitServer
from .weit_state import FOUND, SKETCH, counts_of, task_of


class Weit(WeitServer, ABC):
    """The client half, on top of the server's."""

    def _recollect(self, memory: Memory) -> Recollection:
        return Recollection(self.structure, self.start, self.local_start, memory)

    def tasks(self, memory: Memory) -> tuple[int, ...]:
        """Every task that the device has met."""
        return self._recollect(memory).tasks

    def observe(self, losses: npt.NDArray[np.float64], turn: Turn, memory: Memory) -> bool:
        """CUSUM on the losses; see ``drift``."""
        if "task" not in memory:
            return False
        drift = Drift.from_array(memory["drift"]) if "drift" in memory else Drift()
        drift, fired = drift.observe(losses)
        memory["drift"] = drift.to_array()
        if fired:
            memory["switch"] = np.ones(1, np.uint8)
        return fired

    def _task(self, got: Payload, past: Recollection) -> int:
        told = task_of(got.meta.get("task"), "task", FOUND)
        if told == FOUND:  # "at": where it was last heard, for a device that lost its memory since
            heard = task_of(got.meta.get("at", 0), "at", 0)
            return max(heard, max(past.task, 0) + ("switch" in past.memory))
        if told < past.task:
            raise WireError(
                f"the server speaks of task {told}, this device is at task {past.task} already: does it share its "
                "memory folder or its client number with another device?"
            )
        return told

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """Begin a task where there is a new one, take theta_G and new knowledge, go on training all parts."""
        past = self._recollect(memory)
        task = self._task(got, past)
        memory.pop("switch", None)
        if task != past.task:
            past.switch(task, derive(turn.seed, "masks", task, turn.client))
        if "base" in got.dense:
            self._merge(got, memory)
        past.use(_ids(got, "use"), self._fresh(got))
        write_tensors(self.local(model), memory[f"local.{task}"])
        c = self.config
        return WeitOptimizer(
            model,
            self.structure,
            past.parts(),
            local=[p for name, p in model.named_parameters() if plain(name) not in self.kinds],
            lr=LEARNING_RATE if training.lr is None else training.lr,
            name=training.optimizer,
            lambda1=c.lambda1,
            lambda2=c.lambda2,
            retroactive=c.retroactive,
            raw_masks=c.compat == "released",
            moments=past.moments(),
        )

    def _merge(self, got: Payload, memory: Memory) -> None:
        """Take the columns of theta_G that somebody sent; the others stay the device's own."""
        taken = self.flags(got)[self.column]
        if got.dense["base"].size != taken.sum():
            raise WireError(f"{got.dense['base'].size} values of theta_G for columns of {taken.sum()}")
        base = memory["base"].copy()
        base[taken] = got.dense["base"]
        memory["base"] = base

    def _fresh(self, got: Payload) -> dict[int, tuple[npt.NDArray[np.uint8], Floats]]:
        """Entries that this message brings, by id."""
        fresh = {}
        for slot, i in enumerate(_ids(got, "new")):
            where, values = got.bits.get(f"where.{slot}"), got.dense.get(f"values.{slot}")
            if where is None or values is None or popcount(where) != values.size:
                raise WireError(f"entry {i} of the knowledge base came damaged")
            fresh[int(i)] = (where, values)
        return fresh

    def finish(self, got: Payload, model: nn.Module, optimizer: Optimizer, turn: Turn, memory: Memory) -> Payload:
        """Keep all parts; send columns of B, attention, and the A of a finished task that the server lacks."""
        assert isinstance(optimizer, WeitOptimizer)
        past, c = self._recollect(memory), self.config
        past.keep(_to_cpu(optimizer.parts), read_tensors(self.local(model)), optimizer.moments())
        if c.retroactive == "exact":
            past.settle(c.lambda1, c.lambda2, raw_masks=c.compat == "released")
        flags = self._columns(memory[f"m.{past.task}"])
        bits = {"columns": np.packbits(flags, bitorder="little")}
        dense = {"base": memory["base"][flags[self.column]], "alpha": memory["alpha"].reshape(-1)}
        probe = got.meta.get("probe") == 1
        dense["sketch"] = sketch(memory[f"A.{past.task}"], SKETCH, 0) if probe else np.zeros(0, np.float32)
        done = [*past.earlier, *([past.task] if got.meta.get("last") == 1 else [])]
        left = sorted(set(done) - set(_ids(got, "came").tolist())) if not turn.private else []
        left = [task for task in left if task == past.task or f"end.{task}" in memory]  # not what is gone
        for task in set(past.earlier) - set(left):
            memory.pop(f"end.{task}", None)
        if left:
            name = f"end.{left[0]}" if left[0] != past.task else f"A.{left[0]}"
            bits["where"], dense["values"] = sparsify(memory[name], c.prune_below)
        ids = {"holds": counts_of(past.held), "ids": counts_of(memory["ids"])}
        meta = {"task": past.task, "finished": left[0] if left else -1}
        return Payload(bits=bits, counts=ids, dense=dense, meta=meta)

    def _columns(self, mask: Floats) -> Flags:
        """The columns to send, (columns,): of each kind those with the largest sigma(m)."""
        keep, start = np.zeros(mask.size, bool), 0
        for size in self.structure.column_sizes:
            m = mask[start : start + size]
            if self.config.compat == "fixed":
                most = int(np.ceil((1 - self.config.client_sparsity) * size))
                keep[start + np.argsort(-m, kind="stable")[:most]] = True
            else:  # strictly above the floor(n*s)-th smallest |m|
                cut = np.sort(np.abs(m))[int(size * self.config.client_sparsity)]
                keep[start : start + size] = np.abs(m) > cut
            start += size
        return keep

    def install(self, got: Payload, model: nn.Module, frozen: Tensor, view: View) -> None:
        """Write the device's network of a task, with its own B, which the other parts fit."""
        theta, local = self._recollect(view.memory or {}).theta(view.task)
        self.structure.write(model, torch.from_numpy(theta))
        write_tensors(self.local(model), local)

    def report(self, got: Payload, memory: Memory) -> Mapping[str, float]:
        """``capacity``: floats that the networks of all tasks are made of, over those of one network."""
        past = self._recollect(memory)
        made_of = ("A", "m", "local", "K")
        own = sum(memory[f"{kind}.{i}"].size for i in past.tasks for kind in made_of if f"{kind}.{i}" in memory)
        floats = self.structure.numel + own + sum(memory[f"kb.{i}.values"].size for i in past.held)
        return {"model_bits": 32.0 * floats, "capacity": floats / self.floats}


def _ids(payload: Payload, name: str) -> Ids:
    return payload.counts[name].values.astype(np.int64) if name in payload.counts else np.zeros(0, np.int64)


def _to_cpu(parts: Parts) -> Parts:
    return replace(parts, **{name: getattr(parts, name).cpu() for name in parts.__slots__})
