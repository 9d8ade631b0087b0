"""The plain training and evaluation loops of the bundled apps. Nothing in them knows of masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from .data import epoch_batches
from .masks import derive

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

    ``key`` names all chance: equal keys give equal batches and equal dropout. torch's global state is left alone.
    """
    model.train()
    total, steps = 0.0, 0
    with torch.random.fork_rng([y.device] if y.device.type == "cuda" else []):
        torch.manual_seed(derive("torch", *key).k0)
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
    # Even chunks: batch norm of a seeded network uses the batch, and cannot use a batch of one.
    for rows in torch.arange(len(y), device=y.device).tensor_split(-(-len(y) // EVAL_BATCH)):
        ys = y[rows]
        logits = model(x[rows])
        loss += cross_entropy(logits, ys, reduction="sum").item()
        right += int((logits.argmax(1) == ys).sum())
    return loss / len(y), right / len(y)


def tensors(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy arrays to ``device``."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(device), torch.from_numpy(np.ascontiguousarray(y)).to(
        device
    )
