"""A Beta posterior that devices follow: what is broadcast is what they do not hold yet.

See `fedmask_flwr.methods.trail` for what travels. What relaying reveals: every device sees the coded reply of every
other one, a sample of its theta; ``downlink = "votes"`` shows only sums, as ``"whole"`` does.
"""

from __future__ import annotations

import logging
import math
import zlib
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.wire import Counts, Frame, Payload, Scalar, SideInfo, WireError
from fedmask_flwr.wire import Field as Coded

from .base import Fields, Known, Memory, Training, Turn, Update
from .beta import BetaConfig, BetaMethod, BetaState, Tally
from .reading import read_reply
from .trail import (
    REPLAYS,
    Relayed,
    Trail,
    counts_bytes,
    given_bytes,
    levels,
    read_rounds,
    shortened,
    write_round,
)

log = logging.getLogger(__name__)


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
        self._most = 4 * self.numel + 256  # bytes that counts can take: no relay is longer
        self._said: tuple[BetaState | None, dict[int | None, Payload]] = (None, {})

    # Server

    def advance(self, state: BetaState, turn: Turn) -> BetaState:
        """Note the round, where devices follow."""
        if not self.personal:
            return state
        return replace(state, trail=state.trail.entered(turn.round, turn.rounds))

    def missed(self, state: BetaState, clients: Sequence[int]) -> BetaState:
        """Tell those everything next time: nobody knows what they hold."""
        if not self.personal:
            return state
        trail = replace(state.trail, held=state.trail.without(clients))
        return replace(state, trail=trail)

    def understood(self, state: BetaState, client: int) -> Payload:
        """The whole state, however it came: the same payload for all."""
        return self._saying(state)[None]

    def broadcast(self, state: BetaState, client: int | None = None) -> Payload:
        """Integer counts, or less to a device that follows; nothing at all before the first votes."""
        if not self.personal or client is None:
            return super().broadcast(state)
        said, base = self._saying(state), state.trail.base(client)
        if base not in said:
            less = None if base is None or state.total == 0 or state.flips > 0.0 else self._less(state, base)
            said[base] = said[None] if less is None else less
        return said[base]

    def _saying(self, state: BetaState) -> dict[int | None, Payload]:
        """What devices are told, by what they hold: those that hold the same are told the same, coded once."""
        if self._said[0] is not state:
            self._said = state, {None: super().broadcast(state)}
        return self._said[1]

    def _less(self, state: BetaState, base: int) -> Payload | None:
        """What has come to the counts that round ``base`` began with, where that is less than the counts."""
        trail = state.trail
        meta = {"from": base, "check": checksum(state.ones, state.total)}
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
        tally = Tally(self.numel, self.counted)
        replies: dict[int, tuple[Coded, ...]] = {}
        room = self._most if self.config.downlink == "relay" else -1
        for update in updates:
            tally.add(update.payload, update.flip_rate)
            room -= sum(len(coded.body) for coded in update.fields)
            if len(replies) >= REPLAYS:
                room = -1
            replies[update.client] = update.fields if room >= 0 else ()  # nobody would be told more
        if not tally.masks:
            return state
        anew = self.anew(state)
        following = self.moved(state, tally, anew)
        if not self.personal:
            return following
        relay = b""
        if room >= 0 and state.flips == 0.0 == tally.flips:  # else no device could repeat the round
            found = Relayed(state.trail.now, anew, tuple(sorted(replies.items(), key=itemgetter(0))))
            relay = write_round(found, self._names(self.broadcast(state)))
        return replace(following, trail=self._trail(state, following, sorted(replies), relay))

    def _trail(self, old: BetaState, new: BetaState, clients: Sequence[int], relay: bytes) -> Trail:
        trail, whole = old.trail, counts_bytes(new.ones)
        kept, dropped = b"", trail.now + 1
        if relay:
            kept, dropped = shortened(trail.relay.tobytes() + relay, whole)
        votes = new.ones if new.age == 1 else new.ones - old.ones
        return replace(
            trail,
            last=trail.now,
            before=old.ones,
            before_total=old.total,
            oldest=max(trail.oldest, dropped),
            relay=np.frombuffer(kept, np.uint8),
            whole=whole,
            votes=given_bytes(votes, levels(old.ones, old.total)),
            held=trail.with_trained(clients),
        )

    # Both ends

    def known(self, got: Payload, turn: Turn, shared: Memory) -> SideInfo | None:
        """The guess."""
        return self.guessed(got, turn)

    def guessed(self, got: Payload, turn: Turn) -> SideInfo:
        """The mask m_g that both ends draw from what was broadcast, and how close each u is to its theta_g."""
        return SideInfo(self.spec.sizes, self.guess(got, turn), partial(self.near, got, turn))

    def down(self, shared: Memory) -> Fields:
        """Vote counts, or what has come to those that the device holds."""
        whole = super().down(shared)
        more: Fields = {"votes": ("counts", self.numel), "relay": ("counts", range(1, self._most + 1))}
        return {**whole, **more} if self.personal else whole

    def heard(self, shared: Memory) -> Known:
        """The layers, and for votes the counts that the device holds."""
        layers = SideInfo(self.spec.sizes)
        if not self.personal:
            return layers
        if "ones" not in shared:
            return {"ones": layers}
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
        try:
            state = self._brought(state, got, turn)
            if checksum(state.ones, state.total) == got.meta.get("check"):
                return self.broadcast(state)
        except ValueError as error:
            log.warning("client %d cannot follow: %s", turn.client, error)
        raise WireError(
            "what this device holds and what it was told do not add up to the server's counts: it will be told all "
            "of them in its next round"
        )

    def _brought(self, state: BetaState, got: Payload, turn: Turn) -> BetaState:
        """The state after what a broadcast brings."""
        if "votes" in got.counts:
            votes = got.counts["votes"]
            return self.cast(state, votes.values, votes.top, 0.0, bool(got.meta.get("anew")))
        for found in read_rounds(got.counts["relay"].values.astype(np.uint8).tobytes(), self._names(got)):
            state = self._replayed(state, found, turn)
        return state

    def _names(self, got: Payload) -> list[str]:
        return sorted({name for form in self.up(got, {}) for name in form})

    def _replayed(self, state: BetaState, found: Relayed, turn: Turn) -> BetaState:
        """One relayed round, as the server aggregated it."""
        told, tally = self.broadcast(state), Tally(self.numel, self.counted)
        for client, fields in found.replies:
            whose = Turn(turn.seed, found.round, turn.rounds, client)
            frame = Frame(bytes(8), found.round, fields, {})
            tally.add(self.reconstruct(told, read_reply(frame, self, told, whose, {}).payload, whose))
        return self.moved(state, tally, found.anew)

    # Client

    def begin(self, got: Payload, model: nn.Module, training: Training, turn: Turn, memory: Memory) -> Optimizer:
        """As ever, and keep the counts that the round begins with.

        Raises
        ------
        ValueError
            The device is private, and its reply would be handed on to the others.
        """
        if turn.private and self.config.downlink == "relay":
            raise ValueError(
                'this device is private, and downlink = "relay" hands its replies on to all devices: use "votes"'
            )
        if self.personal:
            counts = got.counts.get("ones", Counts(np.zeros(self.numel, np.uint32), 0))
            memory.update(memory_of(counts.values, counts.top, turn.round))
        return super().begin(got, model, training, turn, memory)


def memory_of(ones: npt.NDArray[np.uint32], total: int, round_: int) -> Memory:
    """What a device keeps: the counts that a round began with, in the fewest bytes that hold them."""
    return {"ones": ones.astype(np.min_scalar_type(total)), "head": np.array([round_, total], np.int64)}


def checksum(ones: npt.NDArray[np.uint32], total: int) -> int:
    """CRC-32 of counts, begun at their total."""
    return zlib.crc32(ones.astype("<u4").tobytes(), total)
