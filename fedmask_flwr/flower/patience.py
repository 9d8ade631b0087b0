"""When to give up a run in which nobody answers any more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .ledger import Ledger


class SilenceError(RuntimeError):
    """Round after round without one usable reply; the message names the commonest reason."""


@dataclass(slots=True)
class Patience:
    """How many rounds in a row were ``silent`` (no reply could be used), and why; ``most`` 0: never give up."""

    most: int
    silent: int = 0
    kept: int = 0  # the last round with a usable reply: where the run would go on
    reasons: Counter[str] = field(default_factory=Counter)

    def look(self, server_round: int, ledger: Ledger) -> None:
        """Take a round into account."""
        if ledger.ok:
            self.silent, self.kept = 0, server_round
            self.reasons.clear()
        else:
            self.silent += 1
            self.reasons.update(ledger.lost)

    @property
    def over(self) -> bool:
        """Whether it is at an end."""
        return 0 < self.most <= self.silent

    def error(self) -> SilenceError:
        """What to end the run with."""
        rounds = "a round" if self.silent == 1 else f"{self.silent} rounds in a row"
        ((reason, count),) = self.reasons.most_common(1) or [("nobody was asked", 0)]
        total = sum(self.reasons.values())
        again = f"goes on after round {self.kept}" if self.kept else "begins at round 1"
        return SilenceError(
            f"no client gave a usable reply in {rounds} (max-silent-rounds); {count} of {total} failures: "
            f"{reason}. Mend that and start the same run again: it {again}"
        )
