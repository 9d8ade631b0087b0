"""Slow, readable twin of fedmask_flwr.masks.weit: dense float64 tensors, autograd and the loss as it is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmask_flwr.masks import Parts, Structure, WeitOptimizer

CASES = ("mlp", "conv", "three")


def build(case: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A small network and a batch for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        x = torch.randn(6, 5)
        if case == "mlp":
            return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), x
        if case == "three":
            layers = [nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 6)]
            return nn.Sequential(*layers), x
        layers = [
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 2),
        ]
        return nn.Sequential(*layers), torch.randn(6, 2, 3, 3)


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    """A structural mask for each weight of 2 or more dimensions, in model order."""
    stream = torch.Generator().manual_seed(seed)
    kinds = [(n, p) for n, p in model.named_parameters() if p.ndim >= 2]
    return {n: torch.rand(p.shape, generator=stream) < density for n, p in kinds}


def random_parts(structure: Structure, tasks: int, entries: int, seed: int) -> Parts:
    """Parts of ordinary size; B and old A have already left their snapshots."""
    stream = torch.Generator().manual_seed(seed)
    n, columns = structure.numel, structure.columns

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=stream)

    base, old = randn(n) / 2, randn(tasks, n) / 4
    return Parts(
        base=base,
        adaptive=randn(n) / 6,
        mask=randn(columns),
        alpha=randn(entries, len(structure.names)) / 5,
        knowledge=randn(entries, n) / 3,
        old_adaptive=old,
        old_masks=randn(tasks, columns),
        snap_base=base + randn(n) / 20,
        snap_adaptive=old + randn(tasks, n) / 20,
    )


def curve(y: Tensor) -> Tensor:
    """A loss whose gradient depends on the output."""
    return (y.square() + torch.sin(2 * y + torch.arange(y.shape[1], device=y.device))).mean()


class SlowWeit:
    """Trains the parts by autograd through theta; masks are dense, one by name of a kind."""

    def __init__(
        self,
        model: nn.Module,
        masks: dict[str, Tensor],
        parts: Parts,
        local: tuple[str, ...] = (),
        *,
        lr: float = 1e-3,
        name: str = "adam",
        lambda1: float = 1e-4,
        lambda2: float = 100.0,
        lambda_mask: float = 0.0,
        retroactive: str = "exact",
        raw_masks: bool = False,
    ) -> None:
        self.model, self.masks = model, masks
        self.l1, self.l2, self.lm = lambda1, lambda2, lambda_mask
        self.retroactive, self.raw = retroactive, raw_masks
        self.fixed = {n: p.detach().double() for n, p in model.named_parameters()}
        tasks, entries = len(parts.old_adaptive), len(parts.knowledge)
        self.B, self.A = self.dense(parts.base), self.dense(parts.adaptive)
        self.m = self.by_column(parts.mask)
        self.alpha = {k: parts.alpha[:, i].double() for i, k in enumerate(masks)}
        self.KB = [self.dense(parts.knowledge[n]) for n in range(entries)]
        self.old_A = [self.dense(parts.old_adaptive[i]) for i in range(tasks)]
        self.old_m = [self.by_column(parts.old_masks[i]) for i in range(tasks)]
        self.snap_B, self.snap_A = (
            self.dense(parts.snap_base),
            [self.dense(parts.snap_adaptive[i]) for i in range(tasks)],
        )
        self.local = {n: self.fixed[n].clone() for n in local}
        groups = [self.B, self.A, self.m, self.alpha, self.local]
        groups += self.old_A if retroactive == "gradient" else []
        self.leaves = [v.requires_grad_() for group in groups for v in group.values()]
        solver = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
        self.solver = solver(self.leaves, lr=lr)

    def dense(self, packed: Tensor) -> dict[str, Tensor]:
        """Put packed values back where the masks are true, row-major."""
        out, rest = {}, packed.double()
        for k, mask in self.masks.items():
            out[k] = torch.zeros(mask.shape, dtype=torch.float64)
            out[k][mask], rest = rest[: int(mask.sum())], rest[int(mask.sum()) :]
        assert not len(rest)
        return out

    def by_column(self, values: Tensor) -> dict[str, Tensor]:
        """One value for each index of the first dimension, shaped so that it broadcasts."""
        out, rest = {}, values.double()
        for k, mask in self.masks.items():
            out[k] = rest[: mask.shape[0]].reshape(-1, *(1,) * (mask.ndim - 1)).clone()
            rest = rest[mask.shape[0] :]
        assert not len(rest)
        return out

    def pack(self, dense: dict[str, Tensor]) -> Tensor:
        """Take the masked values, row-major."""
        return torch.cat([dense[k].detach()[mask] for k, mask in self.masks.items()])

    def flat(self, columns: dict[str, Tensor]) -> Tensor:
        """Take the values of all columns."""
        return torch.cat([columns[k].detach().reshape(-1) for k in self.masks])

    def theta(self) -> dict[str, Tensor]:
        """Weights; where the mask is false, those of the model."""
        out = {}
        for k, M in self.masks.items():
            theta = self.B[k] * torch.sigmoid(self.m[k]) + self.A[k]
            for n, KB in enumerate(self.KB):
                theta = theta + self.alpha[k][n] * KB[k]
            out[k] = torch.where(M, theta, self.fixed[k])
        return out

    def penalty(self) -> Tensor:
        """All terms of the loss but CE."""
        total = torch.zeros((), dtype=torch.float64)
        for k, M in self.masks.items():
            total = total + self.l1 * sum((A[k] * M).abs().sum() for A in [self.A, *self.old_A])
            total = total + self.lm * torch.sigmoid(self.m[k]).sum()
            if self.retroactive == "exact":
                continue  # The A_i follow B without a loss, so B is free.
            for A, snap_A, m in zip(self.old_A, self.snap_A, self.old_m, strict=True):
                s = m[k] if self.raw else torch.sigmoid(m[k])
                drift = (self.B[k] - self.snap_B[k]) * s + A[k] - snap_A[k]
                if self.retroactive == "freeze":
                    drift = (self.B[k] - self.snap_B[k]) * s
                total = total + self.l2 / 2 * ((drift * M) ** 2).sum()
        return total

    def network(self, x: Tensor) -> Tensor:
        """The output of the model with the present theta and local parameters."""
        return functional_call(self.model, {**self.fixed, **self.theta(), **self.local}, (x.double(),))

    def step(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        """One update from the whole loss."""
        self.solver.zero_grad()
        (loss(self.network(x)) + self.penalty()).backward()
        self.solver.step()


def best_by_search(loss: Callable[[Tensor], Tensor], centre: Tensor, width: float, rounds: int = 60) -> Tensor:
    """Elementwise minimum of a convex loss by ternary search, in float64."""
    low, high = centre.double() - width, centre.double() + width
    for _ in range(rounds):
        third = (high - low) / 3
        left = loss(low + third) < loss(high - third)
        low, high = torch.where(left, low, low + third), torch.where(left, high - third, high)
    return (low + high) / 2


def locals_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of fewer than 2 dimensions."""
    return {n: p for n, p in model.named_parameters() if p.ndim < 2}


def make(case="mlp", density=1.0, tasks=2, entries=2, seed=0, **settings):
    """A model that trains, its batch, its masks and its optimiser."""
    model, x = build(case, seed)
    masks = random_masks(model, density, seed)
    structure = Structure.of(model, masks)
    parts = random_parts(structure, tasks, entries, seed)
    optimiser = WeitOptimizer(model, structure, parts, local=list(locals_of(model).values()), **settings)
    return model, x, masks, parts, optimiser


def train(model, optimiser, x, steps=1):
    for _ in range(steps):
        optimiser.zero_grad()
        curve(model(x)).backward()
        optimiser.step()


def fast_and_slow(steps, case="mlp", density=1.0, tasks=2, entries=2, seed=0, **settings):
    """Train a network and its twin; return the optimiser and pairs of what they have become, by name."""
    twin, _ = build(case, seed)
    model, x, masks, parts, optimiser = make(case, density, tasks, entries, seed, **settings)
    slow = SlowWeit(twin.double(), masks, parts, tuple(locals_of(model)), **settings)
    for _ in range(steps):
        train(model, optimiser, x)
        slow.step(x, curve)
    now = optimiser.parts
    pairs = {
        "base": (now.base, slow.pack(slow.B)),
        "adaptive": (now.adaptive, slow.pack(slow.A)),
        "mask": (now.mask, slow.flat(slow.m)),
        "alpha": (now.alpha, torch.stack([slow.alpha[k].detach() for k in masks], 1)),
        **{f"old {i}": (now.old_adaptive[i], slow.pack(A)) for i, A in enumerate(slow.old_A)},
        **{n: (p.detach(), slow.local[n].detach()) for n, p in locals_of(model).items()},
        **{n: (p.detach(), slow.theta()[n].detach()) for n, p in model.named_parameters() if p.ndim >= 2},
    }
    return optimiser, pairs


def assert_same(pairs, atol=1e-5):
    for name, (fast, slow) in pairs.items():
        assert torch.allclose(fast.double(), slow, rtol=1e-5, atol=atol), name
