"""A Beta posterior that devices follow: what is broadcast is what they do not hold yet.

See `fedmask_flwr.methods.trail` for what travels. What relaying reveals: every device sees the coded reply of every
other one, a sample of its theta; ``downlink = "votes"`` shows only sums, as ``"whole"`` does.
"""

from __future__ import annotations

import math
import zlib
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.aggregate import VoteCounter
from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.wire import Counts, Frame, Payload, Scalar, SideInfo, WireError

from .base import Fields, Known, Memory, Training, Turn, Update
from .beta import BetaConfig, BetaMethod, BetaState
from .reading import read_reply
from .trail import Relayed, Trail, counts_bytes, given_bytes, levels, read_rounds, shortened, write_round


class FollowedConfig(BetaConfig):
    """Settings of the posterior, and how devices hear of it."""

    downlink: Literal["whole", "votes", "relay"] = Field(
        "whole",
        description='"votes": devices keep the counts and are told the last votes; "relay": or the replies of '
        "other devices; whichever takes the fewest bytes",
    )


class FollowedMethod(BetaMethod, ABC):
    """A method of the posterior whose devices may keep its counts."""

    Config: ClassVar[type[FollowedConfig]] = FollowedConfig

    def __init__(self, spec: MaskSpec, model: nn.Module, config: Any = None, *, fraction: float = 1.0) -> None:
        super().__init__(spec, model, config, fraction=fraction)
        self.personal = self.config.downlink != "whole"
        if self.personal:
            self.codecs = {**self.codecs, "counts": "counts-by-class"}
        self._said: tuple[BetaState | None, dict[int, Payload | None]] = (None, {})

    # Server

    def advance(self, state: BetaState, turn: Turn) -> BetaState:
        """Note the round, where devices follow."""
        if not self.personal:
            return state
        return replace(state, trail=replace(state.trail, now=turn.round))

    def missed(self, state: BetaState, clients: Sequence[int]) -> BetaState:
        """Tell those everything next time: nobody knows what they hold."""
        if not self.personal:
            return state
        trail = replace(state.trail, held=state.trail.without(clients))
        return replace(state, trail=trail)

    def understood(self, state: BetaState, client: int) -> Payload:
        """The whole state, however it came."""
        return self.broadcast(state)

    def broadcast(self, state: BetaState, client: int | None = None) -> Payload:
        """Integer counts, or less to a device that follows; nothing at all before the first votes."""
        base = state.trail.base(client) if self.personal and client is not None else None
        if base is None or state.total == 0 or state.flips > 0.0:
            return super().broadcast(state)
        if self._said[0] is not state:  # devices that hold the same are told the same
            self._said = state, {}
        if base not in self._said[1]:
            self._said[1][base] = self._less(state, base)
        return self._said[1][base] or super().broadcast(state)

    def _less(self, state: BetaState, base: int) -> Payload | None:
        """What has come to the counts that round ``base`` began with, where that is less than the counts."""
        trail = state.trail
        meta = {"from": base, "check": checksum(state.ones)}
        relay = trail.since(base) if self.config.downlink == "relay" else None
        votes = trail.votes if base == trail.last else math.inf
        if relay is not None and len(relay) <= min(votes, trail.whole):
            return Payload(
                counts={"relay": Counts(np.frombuffer(relay, np.uint8).astype(np.uint32), 255)}, meta=meta
            )
        if votes >= trail.whole:
            return None
        anew = state.age == 1
        cast = state.ones if anew else state.ones - trail.before
        masks = state.total if anew else state.total - trail.before_total
        return Payload(counts={"votes": Counts(cast, masks)}, meta={**meta, "anew": int(anew)})

    def recall(self, state: BetaState, client: int) -> Memory:
        """The counts that the last round began with, where that is what the client holds."""
        trail = state.trail
        if not self.personal or not trail.last or trail.base(client) != trail.last:
            return {}
        return memory_of(trail.before, trail.before_total, trail.last)

    def aggregate(self, state: BetaState, updates: Iterable[Update]) -> BetaState:
        """alpha += M, beta += K - M; reset first when the window of ceil(1/rho) rounds is over."""
        votes, flips = VoteCounter(self.numel), 0.0
        replies = []
        for update in updates:
            votes.add(update.payload.bits["mask"])
            flips += update.flip_rate
            if self.personal:
                replies.append((update.client, update.fields))
        if votes.masks == 0:
            return state
        anew = self.anew(state)
        cast = votes.votes()
        following = self.cast(state, cast, votes.masks, flips, anew)
        if not self.personal:
            return following
        found = Relayed(state.trail.now, anew, tuple(replies))
        return replace(following, trail=self._trail(state, following, cast, found))

    def _trail(self, old: BetaState, new: BetaState, votes: npt.NDArray[np.uint32], found: Relayed) -> Trail:
        trail, names = old.trail, self._names(self.broadcast(old))
        whole = counts_bytes(new.ones)
        kept = trail.relay.tobytes() + write_round(found, names) if self.config.downlink == "relay" else b""
        kept, dropped = shortened(kept, whole)  # nobody would be told more
        return replace(
            trail,
            last=trail.now,
            before=old.ones,
            before_total=old.total,
            oldest=max(trail.oldest, dropped),
            relay=np.frombuffer(kept, np.uint8),
            whole=whole,
            votes=given_bytes(votes, levels(old.ones, old.total)),
            held=trail.with_trained([client for client, _ in found.replies]),
        )

    # Both ends

    def down(self, shared: Memory) -> Fields:
        """Vote counts, or what has come to those that the device holds."""
        whole = super().down(shared)
        more: Fields = {"votes": ("counts", self.numel), "relay": ("counts", range(1, 1 << 31))}
        return {**whole, **more} if self.personal else whole

    def heard(self, shared: Memory) -> Known:
        """The layers, and for votes the counts that the device holds."""
        layers = SideInfo(self.spec.sizes)
        if "ones" not in shared:
            return layers
        held, total = shared["ones"], int(shared["head"][1])
        return {"ones": layers, "votes": SideInfo(self.spec.sizes, None, partial(levels, held, total))}

    def in_step(self, meta: Mapping[str, Scalar], memory: Memory) -> bool:
        """Whether the device holds the counts that the server goes on from."""
        return "from" not in meta or ("head" in memory and int(memory["head"][0]) == meta["from"])

    def complete(self, got: Payload, turn: Turn, memory: Memory) -> Payload:
        """Add what came to what the device holds.

        Raises
        ------
        WireError
            It holds something else, or the sum is not the server's.
        """
        if "from" not in got.meta:
            return got
        if not self.in_step(got.meta, memory) or not ({"votes", "relay"} & set(got.counts)):
            raise WireError(
                f"this device does not hold the counts of round {got.meta['from']} any more: it will be told all "
                "of them in its next round"
            )
        state = BetaState(memory["ones"].astype(np.uint32), int(memory["head"][1]), 0, 0.0)
        if "votes" in got.counts:
            votes = got.counts["votes"]
            state = self.cast(state, votes.values, votes.top, 0.0, bool(got.meta.get("anew")))
        else:
            for found in read_rounds(got.counts["relay"].values.astype(np.uint8).tobytes(), self._names(got)):
                state = self._replayed(state, found, turn)
        if checksum(state.ones) != got.meta.get("check"):
            raise WireError(
                "what this device holds and what it was told do not add up to the server's counts: it will be told "
                "all of them in its next round"
            )
        return self.broadcast(state)

    def _names(self, got: Payload) -> list[str]:
        return sorted({name for form in self.up(got, {}) for name in form})

    def _replayed(self, state: BetaState, found: Relayed, turn: Turn) -> BetaState:
        """One relayed round, as the server aggregated it."""
        told, votes = self.broadcast(state), VoteCounter(self.numel)
        for client, fields in found.replies:
            whose = Turn(turn.seed, found.round, turn.rounds, client)
            frame = Frame(bytes(8), found.round, fields, {})
            mask = self.reconstruct(told, read_reply(frame, self, told, whose, {}).payload, whose).bits["mask"]
            votes.add(mask)
        return self.cast(state, votes.votes(), votes.masks, 0.0, found.anew)

    # Client

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """As ever, and keep the counts that the round begins with."""
        if self.personal:
            counts = got.counts.get("ones", Counts(np.zeros(self.numel, np.uint32), 0))
            memory.update(memory_of(counts.values, counts.top, turn.round))
        return super().begin(got, model, training, turn, memory)


def memory_of(ones: npt.NDArray[np.uint32], total: int, round_: int) -> Memory:
    """What a device keeps: the counts that a round began with, in the fewest bytes that hold them."""
    return {"ones": ones.astype(np.min_scalar_type(total)), "head": np.array([round_, total], np.int64)}


def checksum(ones: npt.NDArray[np.uint32]) -> int:
    """CRC-32 of counts."""
    return zlib.crc32(ones.astype("<u4").tobytes())
