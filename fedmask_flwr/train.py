"""The plain training and evaluation loops of the bundled apps. Nothing in them knows of masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .data import epoch_batches

EVAL_BATCH = 1000


def device_of(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    key: tuple[int | str, ...],
) -> float:
    """Train with cross-entropy on x (n, *in_shape), y (n,); return the mean loss in nats over all steps.

    ``key`` names the shuffle: equal keys give equal batches.
    """
    model.train()
    total, steps = 0.0, 0
    for epoch in range(epochs):
        for rows in epoch_batches(len(y), batch_size, (*key, epoch)):
            index = torch.from_numpy(rows).to(y.device)
            optimizer.zero_grad()
            loss = cross_entropy(model(x[index]), y[index])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            steps += 1
    return total / max(steps, 1)


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy in nats and accuracy on x (n, *in_shape), y (n,)."""
    model.eval()
    loss, right = 0.0, 0
    for start in range(0, len(y), EVAL_BATCH):
        ys = y[start : start + EVAL_BATCH]
        logits = model(x[start : start + EVAL_BATCH])
        loss += cross_entropy(logits, ys, reduction="sum").item()
        right += int((logits.argmax(1) == ys).sum())
    return loss / len(y), right / len(y)


def tensors(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy arrays to ``device``."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(device), torch.from_numpy(np.ascontiguousarray(y)).to(
        device
    )
