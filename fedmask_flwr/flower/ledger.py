"""What a round cost and who answered: frames, bytes and failures, counted on what really travelled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message

from .records import ARRAYS, flower_bytes, frame_of, record

REASON = 200  # characters that are kept of why a client failed


def brief(text: object) -> str:
    """One line of what a client said, or of an error about it: nobody else fills a log, or forges its lines."""
    return " ".join(str(text)[: 10 * REASON].split())[:REASON]


@dataclass(slots=True)
class Ledger:
    """Counts of one round. Bytes are totals over clients, of whole frames; Flower's own bytes stand apart."""

    sent: int = 0
    silent: int = 0  # sampled, but not told anything: they did not say who they are
    ok: int = 0
    asked: int = 0
    evaluated: int = 0
    uplink: int = 0
    downlink: int = 0
    evaluation: int = 0
    accepted: int = 0
    flower_uplink: int = 0
    flower_downlink: int = 0
    metrics: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # why training replies could not be used

    def __post_init__(self) -> None:
        if self.silent:
            self.lost["it did not tell its client number"] = self.silent

    def send(self, messages: Sequence[Message]) -> None:
        """Count a round's training messages."""
        self.sent = len(messages)
        self.downlink = self._spend(messages)

    def ask(self, messages: Sequence[Message]) -> None:
        """Count its evaluation messages; their frames stand apart, since training does not need them."""
        self.asked = len(messages)
        self.evaluation = self._spend(messages)

    def lose(self, reason: str) -> None:
        """Note why a training reply could not be used."""
        self.lost[brief(reason)] += 1

    def receive(self, reply: Message) -> None:
        """Count a reply's bytes, readable or not."""
        arrays = [found for found in reply.content.values() if isinstance(found, ArrayRecord)]
        frames = sum(len(array.data) for found in arrays for array in found.values())
        self.uplink += frames
        self.flower_uplink += flower_bytes(reply.content, frames)

    def accept(self, nbytes: int, examples: float, metrics: dict[str, float]) -> None:
        """Count a training reply of a frame of ``nbytes`` that could be used."""
        self.ok += 1
        self.accepted += nbytes
        self.metrics.append((examples, metrics))

    def _spend(self, messages: Sequence[Message]) -> int:
        frames = [len(frame_of(record(message.content, ARRAYS, ArrayRecord))) for message in messages]
        self.flower_downlink += sum(flower_bytes(m.content, n) for m, n in zip(messages, frames, strict=True))
        return sum(frames)

    def line(self, numel: int) -> dict[str, float]:
        """The round's figures; bits per parameter are means over training clients, of d = ``numel`` parameters."""
        return {
            "uplink_bytes": self.uplink,
            "downlink_bytes": self.downlink,
            "uplink_bpp": 8.0 * self.accepted / max(self.ok, 1) / numel,
            "downlink_bpp": 8.0 * self.downlink / max(self.sent, 1) / numel,
            "evaluate_bytes": self.evaluation,
            "flower_uplink_bytes": self.flower_uplink,
            "flower_downlink_bytes": self.flower_downlink,
            "clients_ok": self.ok,
            "clients_failed": self.sent + self.silent - self.ok,
            "evaluations_failed": self.asked - self.evaluated,
        }


def weighted_means(metrics: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Mean of each metric over the clients that gave it, weighted by examples; one that overflows is left out."""
    means = {}
    for name in sorted({name for _, values in metrics for name in values}):
        pairs = [(n, values[name]) for n, values in metrics if name in values]
        mean = sum(n * v for n, v in pairs) / sum(n for n, _ in pairs)
        if math.isfinite(mean):
            means[name] = mean
    return means


def spread(metrics: Sequence[tuple[float, dict[str, float]]], name: str) -> dict[str, float]:
    """How one metric lies over clients, each counted once: mean, standard deviation, worst decile and worst.

    The worst decile is the mean of the ceil(n / 10) lowest.
    """
    values = sorted(values[name] for _, values in metrics if name in values)
    if not values:
        return {}
    mean = sum(values) / len(values)
    worst = values[: -(-len(values) // 10)]
    return {
        f"{name}_mean": mean,
        f"{name}_std": (sum((v - mean) * (v - mean) for v in values) / len(values)) ** 0.5,
        f"{name}_worst_decile": sum(worst) / len(worst),
        f"{name}_worst": values[0],
    }
