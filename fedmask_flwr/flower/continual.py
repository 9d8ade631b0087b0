"""What a device of a scenario reports: how well it does in every task that it has met."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .client import MaskTurn
from .device import Device


def met(device: Device, turn: MaskTurn) -> dict[str, float]:
    """Losses in nats an example, and accuracies, on the test examples of the device's tasks so far.

    ``loss`` is the mean over tasks, each in its own network (task-aware); ``loss_base`` the first task's,
    ``loss_new`` the present one's, ``loss_task_j`` each one's. ``loss_latest`` is the mean in the latest network
    alone. Where a device has several networks of a density, ``loss_mixture`` is that of p(x) = 1/T sum_t
    p(x | theta_t), which needs no task and costs at most ln T nats, and ``task_found`` how often the likeliest
    network is the task's own. A method with one network has the same figures for all.
    """
    networks = turn.tasks or (None,)
    rows = range(device.task + 1)
    # The network that was trained on it last; where there is none (it was not asked then), that of the task before.
    marks = turn.marks
    trained = [marks[max((m for m in marks if m <= j), default=min(marks))] if marks else j for j in rows]
    own = [turn.tasks.index(task) if task in turn.tasks else 0 for task in trained]
    found: list[list[tuple[Tensor, Tensor | None]]] = [[] for _ in rows]
    for task in networks:
        turn.load(task=task)
        for j in rows:
            found[j].append(device.losses("test", j))
    loss = [float(found[j][own[j]][0].mean()) for j in rows]
    latest = [float(found[j][-1][0].mean()) for j in rows]
    figures = {
        "loss": mean(loss),
        "loss_base": loss[0],
        "loss_new": loss[-1],
        "loss_latest": mean(latest),
        "loss_latest_base": latest[0],
        **{f"loss_task_{j}": value for j, value in enumerate(loss)},
    }
    right = [found[j][own[j]][1] for j in rows]
    if any(r is None for r in right):
        nll = [torch.stack([losses for losses, _ in found[j]]) for j in rows]  # (networks, n)
        mixture = [math.log(len(networks)) - torch.logsumexp(-part, 0) for part in nll]
        hits = [float((part.argmin(0) == own[j]).double().mean()) for j, part in enumerate(nll)]
        return {**figures, "loss_mixture": mean([float(m.mean()) for m in mixture]), "task_found": mean(hits)}
    accuracy = [float(r.double().mean()) for r in right if r is not None]
    return {
        **figures,
        "accuracy": mean(accuracy),
        "accuracy_base": accuracy[0],
        "accuracy_new": accuracy[-1],
        **{f"accuracy_task_{j}": value for j, value in enumerate(accuracy)},
    }


def mean(values: list[float]) -> float:
    """Mean of one or more values."""
    return sum(values) / len(values)
