"""The plain training and evaluation loops of the bundled apps. Nothing in them knows of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from .data import Dataset, epoch_batches
from .masks import derive

EVAL_BATCH = 1000
EVAL_INPUTS = 1 << 18  # numbers in a batch of inputs, 85 images of CIFAR-10: a small device evaluates too
STEPS = 1048583  # masks are cycled by step, from a multiple of this prime on: devices of any size are in phase
Losses = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(model, x, y) -> loss of each example in nats (n,), and whether it is right (n,), None of a density."""


def device_of(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one.

    Raises
    ------
    RuntimeError
        There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).splitlines()[0]
        raise RuntimeError(
            f"device is {name!r}: use auto, cpu, or cuda or cuda:N where there is one ({said})"
        ) from error


def train(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch_size: int,
    key: tuple[int | str, ...],
    losses: Losses | None = None,
    phase: int = 0,
) -> float:
    """Train on x (n, *in_shape), y (n,); return the mean loss in nats over all steps.

    ``key`` names all chance: equal keys give equal batches and equal dropout. torch's global state is left alone.
    ``losses`` is cross-entropy unless given (`losses_of`). A model that cycles through masks is told where it is:
    ``phase`` and the number of the step.
    """
    model.train()
    total, steps, losses = 0.0, 0, losses or classified
    select = getattr(model, "select", None)
    with torch.random.fork_rng([y.device] if y.device.type == "cuda" else []):
        torch.manual_seed(derive("torch", *key).k0)
        for epoch in range(epochs):
            for rows in epoch_batches(len(y), batch_size, (*key, epoch)):
                index = torch.from_numpy(rows).to(y.device)
                optimizer.zero_grad()
                if select is not None:
                    select(phase + steps)
                loss = losses(model, x[index], y[index])[0].mean()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.item()
                steps += 1
    return total / max(steps, 1)


def losses_of(model: nn.Module, examples: Dataset) -> Losses:
    """How ``model`` is trained and judged on such examples.

    A density model (one with ``nll``) by its negative log-likelihood over inputs that are no padding; another by
    cross-entropy among the labels that the examples may have, so that a task is not judged by what others taught.
    """
    if hasattr(model, "nll"):
        return lambda model, x, y: (model.nll(x, examples.valid), None)  # type: ignore[operator]
    labels = examples.labels
    if labels is None:
        return classified
    among = torch.tensor(labels)

    def within(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        own = among.to(y.device)
        logits = model(x)[:, own]
        target = torch.searchsorted(own, y)
        return cross_entropy(logits, target, reduction="none"), logits.argmax(1) == target

    return within


def classified(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy over all classes."""
    logits = model(x)
    return cross_entropy(logits, y, reduction="none"), logits.argmax(1) == y


@torch.no_grad()
def each(model: nn.Module, x: Tensor, y: Tensor, losses: Losses | None = None) -> tuple[Tensor, Tensor | None]:
    """Loss of every example in nats (n,), float64, and whether it is right (n,)."""
    model.eval()
    parts = [(losses or classified)(model, x[rows], y[rows]) for rows in chunks(model, x)]
    found = [right for _, right in parts if right is not None]
    return torch.cat([loss.double() for loss, _ in parts]), torch.cat(found) if found else None


def evaluate(model: nn.Module, x: Tensor, y: Tensor, losses: Losses | None = None) -> tuple[float, float | None]:
    """Mean loss in nats and accuracy (None of a density) on x (n, *in_shape), y (n,)."""
    loss, right = each(model, x, y, losses)
    return float(loss.mean()), None if right is None else float(right.double().mean())


def chunks(model: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Rows of x (n, *in_shape) in even parts.

    Batch norm of a seeded network uses the batch, and cannot use a batch of one: its parts are as large as ever.
    """
    size = EVAL_BATCH
    if x.device.type == "cpu" and not any(_uses_batch(module) for module in model.modules()):
        size = min(size, max(1, EVAL_INPUTS // x[0].numel()))
    yield from torch.arange(len(x), device=x.device).tensor_split(-(-len(x) // size))


def _uses_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None


def tensors(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy arrays to ``device``."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(device), torch.from_numpy(np.ascontiguousarray(y)).to(
        device
    )
