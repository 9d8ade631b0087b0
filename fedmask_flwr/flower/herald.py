"""What the server says: frames, each coded once for all that hear the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, final

from flwr.app import Array, ArrayRecord, Message

from fedmask_flwr.methods import Known, Method
from fedmask_flwr.plan import Plan
from fedmask_flwr.wire import Frame, Payload, pack

from .records import content_of, frame_array, frame_record, plan_config

SHARED = 8  # broadcasts that are kept coded while messages are written


@final
class Herald:
    """Codes what a method broadcasts; ``digest`` names the model."""

    def __init__(self, method: Method[Any], digest: bytes) -> None:
        self._method, self._digest = method, digest
        self._last: tuple[Any, bytes] = None, b""  # the state that was broadcast last, and its frame

    def coded(self, payload: Payload, server_round: int, known: Known) -> bytes:
        """A frame of ``payload``."""
        return pack(payload, digest=self._digest, round_=server_round, known=known, codecs=self._method.codecs)

    def arrays(self, state: Any, server_round: int) -> ArrayRecord:
        """What anyone can read of ``state``."""
        frame = self.coded(self._method.broadcast(state), server_round, self._method.heard({}))
        self._last = state, frame
        return frame_record(frame, self._method.numel)

    def messages(
        self,
        state: Any,
        clients: Mapping[int, int],
        kind: str,
        plan: Plan,
        server_round: int,
        config: Mapping[str, Any],
    ) -> list[Message]:
        """A message of ``kind`` ("train" or "evaluate") to each node of ``clients``, {node: its number}."""
        method = self._method
        say = partial(method.inquire if kind == "evaluate" else method.broadcast, state)
        frames: dict[int, tuple[Payload, Array]] = {}  # one array of all messages that say the same
        told, payload = plan_config(plan, server_round, config), None
        messages = []
        for node, client in clients.items():
            if method.personal or payload is None:
                payload = say(client)
            if id(payload) not in frames:
                packed = self._frame(state, payload, client, kind, server_round)
                if len(frames) == SHARED:
                    frames.pop(next(iter(frames)))
                frames[id(payload)] = payload, frame_array(packed, method.numel)
            # a record each: Flower may edit it
            messages.append(Message(content_of(frames[id(payload)][1], told), node, kind))
        return messages

    def _frame(self, state: Any, payload: Payload, client: int, kind: str, server_round: int) -> bytes:
        last, frame = self._last
        if last is state and kind == "train" and not self._method.personal:
            return replace(Frame.parse(frame), round_=server_round).to_bytes()  # only the number is new
        return self.coded(payload, server_round, self._method.heard(self._method.recall(state, client)))
