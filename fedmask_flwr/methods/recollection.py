"""What a device of the FedWeIT family remembers: its parts of theta for every task, as arrays on its own disk.

==================  ===================================================================
``task``            (1,) int64, the task that it is at
``base``            (n,) B
``A.i m.i local.i`` A_i (n,), m_i (columns,) and the other floats of task i (biases, its head)
``K.i``             (n,) sum_n alpha_n KB_n of a finished task, which is a constant by then
``ids alpha``       (N,) int64 and (N, kinds): the entries in use and the attention they get
``kb.i.where``      the entries themselves, as they came: packed flags, and ``kb.i.values``
``end.i``           (n,) A_i as it was when its task ended, until the server has it
``snap.base``       (n,) B when the task began, and ``snap.A.i`` of each earlier task
``moments.*``       what the optimiser carries from step to step
``drift``           the detector's state, where the device finds its tasks itself
==================  ===================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmask_flwr.aggregate import densify
from fedmask_flwr.masks import Key, Parts, Structure, compose, settle, words

from .base import Memory

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
ADAPTIVE_SHARE = np.float32(1 / 3)  # A starts as B/3 (FedWeIT's released code); from 0 it learns worse


class Recollection:
    """A view of a device's memory; all changes are made in it, in place.

    ``start`` (n,) and ``local`` are what a device has that was never trained: the named weights.
    """

    def __init__(self, structure: Structure, start: Floats, local: Floats, memory: Memory) -> None:
        self.structure, self.start, self.local_start, self.memory = structure, start, local, memory

    @property
    def task(self) -> int:
        """The task that the device is at, -1 before its first turn."""
        return int(self.memory["task"][0]) if "task" in self.memory else -1

    @property
    def tasks(self) -> tuple[int, ...]:
        """Every task that it has met, ascending."""
        return tuple(sorted(int(name[2:]) for name in self.memory if name.startswith("A.")))

    @property
    def earlier(self) -> tuple[int, ...]:
        """Those that are finished."""
        return tuple(task for task in self.tasks if task != self.task)

    @property
    def held(self) -> Ids:
        """Ids of the entries of knowledge that it keeps, ascending."""
        names = (name.split(".") for name in self.memory if name.startswith("kb."))
        return np.sort(np.array([int(parts[1]) for parts in names if parts[2] == "where"], np.int64))

    @property
    def base(self) -> Floats:
        """B, (n,)."""
        return self.memory.get("base", self.start)

    def switch(self, task: int, key: Key) -> None:
        """Finish the present task, if there is one, and begin ``task`` with parts of its own."""
        memory, structure = self.memory, self.structure
        if self.task >= 0:
            if (kept := self._knowledge_sum()) is not None:
                memory[f"K.{self.task}"] = kept
            memory["snap.base"] = memory["base"].copy()
            memory[f"end.{self.task}"] = memory[f"A.{self.task}"].copy()
            for i in self.tasks:
                memory[f"snap.A.{i}"] = memory[f"A.{i}"].copy()
        else:
            memory["base"] = self.start.copy()
        memory["task"] = np.array([task], np.int64)
        memory[f"A.{task}"] = memory["base"] * ADAPTIVE_SHARE
        memory[f"m.{task}"] = first_masks(key, structure.column_sizes)
        memory[f"local.{task}"] = self.local_start.copy()
        memory["ids"] = np.zeros(0, np.int64)
        memory["alpha"] = np.zeros((0, len(structure.names)), np.float32)
        for name in [name for name in memory if name.startswith("moments.")]:
            del memory[name]

    def use(self, ids: Ids, fresh: dict[int, tuple[npt.NDArray[np.uint8], Floats]]) -> None:
        """Attend to those of ``ids`` that are ``fresh`` or held; entries that nobody asks for are let go."""
        memory = self.memory
        for i, (where, values) in fresh.items():
            memory[f"kb.{i}.where"], memory[f"kb.{i}.values"] = where, values
        held = self.held
        for i in np.setdiff1d(held, ids):
            del memory[f"kb.{i}.where"], memory[f"kb.{i}.values"]
        mine = np.intersect1d(held, ids)
        row = {int(i): k for k, i in enumerate(memory["ids"])}
        for name in ("alpha", "moments.alpha.exp_avg", "moments.alpha.exp_avg_sq"):
            if name in memory:  # attention goes with its entry, wherever that stands now
                before = memory[name].reshape(len(row), len(self.structure.names))
                now = np.zeros((len(mine), before.shape[1]), np.float32)
                for k, i in enumerate(mine):
                    if int(i) in row:
                        now[k] = before[row[int(i)]]
                memory[name] = now if name == "alpha" else now.reshape(-1)
        if not len(mine):
            for name in [name for name in memory if name.startswith("moments.alpha.")]:
                del memory[name]
        memory["ids"] = mine.astype(np.int64)

    def knowledge(self) -> Tensor:
        """The entries in use, dense: (N, n)."""
        n, rows = self.structure.numel, [self._entry(int(i)) for i in self.memory["ids"]]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, n), np.float32))

    def _entry(self, i: int) -> Floats:
        return densify(self.memory[f"kb.{i}.where"], self.memory[f"kb.{i}.values"], self.structure.numel)

    def _knowledge_sum(self) -> Floats | None:
        """sum_n alpha_n KB_n of the present task, (n,)."""
        if not len(self.memory["ids"]):
            return None
        zero = torch.zeros(self.structure.numel)
        mask = torch.zeros(self.structure.columns)
        return compose(self.structure, zero, mask, zero, self._tensor("alpha"), self.knowledge()).numpy()

    def _tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.memory[name])

    def _stack(self, prefix: str, tasks: Sequence[int], width: int) -> Tensor:
        rows = [self.memory[f"{prefix}.{i}"] for i in tasks]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, width), np.float32))

    def parts(self) -> Parts:
        """The parts of the present task, for the optimiser."""
        n, columns, task, old = self.structure.numel, self.structure.columns, self.task, self.earlier
        return Parts(
            base=self._tensor("base"),
            adaptive=self._tensor(f"A.{task}"),
            mask=self._tensor(f"m.{task}"),
            alpha=self._tensor("alpha"),
            knowledge=self.knowledge(),
            old_adaptive=self._stack("A", old, n),
            old_masks=self._stack("m", old, columns),
            snap_base=self._tensor("snap.base" if old else "base"),
            snap_adaptive=self._stack("snap.A", old, n),
        )

    def keep(self, parts: Parts, local: Floats, moments: dict[str, npt.NDArray[Any]]) -> None:
        """Take over what was trained."""
        memory, task = self.memory, self.task
        memory["base"], memory[f"A.{task}"] = parts.base.numpy(), parts.adaptive.numpy()
        memory[f"m.{task}"], memory["alpha"] = parts.mask.numpy(), parts.alpha.numpy()
        memory[f"local.{task}"] = local
        for i, row in zip(self.earlier, parts.old_adaptive.numpy(), strict=True):
            memory[f"A.{i}"] = row.copy()
        memory.update({f"moments.{name}": value for name, value in moments.items()})

    def moments(self) -> dict[str, npt.NDArray[Any]] | None:
        """What the optimiser of the present task carried, None at its first step."""
        found = {name[8:]: value for name, value in self.memory.items() if name.startswith("moments.")}
        return found or None

    def settle(self, lambda1: float, lambda2: float, *, raw_masks: bool) -> None:
        """Give the earlier tasks the A_i that make up for what happened to B: the exact retroactive step."""
        if not (old := self.earlier):
            return
        parts = self.parts()
        rows = settle(
            self.structure,
            parts.base,
            parts.snap_base,
            parts.old_masks,
            parts.snap_adaptive,
            lambda1,
            lambda2,
            raw_masks=raw_masks,
        )
        for i, row in zip(old, rows.numpy(), strict=True):
            self.memory[f"A.{i}"] = row.copy()

    def theta(self, task: int | None = None) -> tuple[Floats, Floats]:
        """The network of a task (None: the present one): theta (n,), and its other floats."""
        task = self.task if task is None else task
        if task < 0:
            return self.start, self.local_start
        if f"A.{task}" not in self.memory:
            raise ValueError(f"this device never met task {task}, only {', '.join(map(str, self.tasks))}")
        now = task == self.task
        n, kinds = self.structure.numel, len(self.structure.names)
        alpha = self._tensor("alpha") if now else torch.zeros(0, kinds)
        knowledge = self.knowledge() if now else torch.zeros(0, n)
        base, mask, adaptive = (self._tensor(name) for name in ("base", f"m.{task}", f"A.{task}"))
        theta = compose(self.structure, base, mask, adaptive, alpha, knowledge).numpy()
        return theta + self.memory.get(f"K.{task}", np.float32(0)), self.memory[f"local.{task}"]


def first_masks(key: Key, sizes: Sequence[int]) -> Floats:
    """Keyed uniform values around 0, variance 1/n_out in each kind: m before its first step, (columns,)."""
    uniform = words(key, sum(sizes)).astype(np.float64) / 2.0**31
    bounds = np.concatenate([np.full(size, np.sqrt(3.0 / size)) for size in sizes])
    return np.asarray(uniform * bounds, np.float32)
