"""A client's turn: from a message to a model and an optimiser, and back to a message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr.masks import Mode, derive, frozen_weights, initialise, model_digest
from fedmask_flwr.memory import DeviceMemory, default_folder
from fedmask_flwr.methods import Turn, View
from fedmask_flwr.plan import AS_BUILT
from fedmask_flwr.setting import structure_id
from fedmask_flwr.wire import WireError, pack

from .records import ARRAYS, CONFIG, MASKS, METRICS, frame_of, frame_record, read_broadcast, read_plan

MARK = "mark."
ERROR, RAISED = 40, 2  # logging.ERROR; Flower's code for "the ClientApp raised an exception"
Handler = Callable[[Message, Context], Message]


class MaskTurn:
    """What a Flower client needs to train or evaluate a mask with a loop of its own.

    ::

        turn = MaskTurn(msg, context, model)   # was: model.load_state_dict(msg.content["arrays"]...)
        optimizer = turn.optimizer()           # was: torch.optim.Adam(model.parameters())
        ...                                    # the training loop, unchanged
        return turn.reply(num_examples=n)      # was: Message(RecordDict({"arrays": ArrayRecord(...), ...

    Raises
    ------
    WireError
        When the message holds no readable frame, or one for another model or other frozen weights.
    """

    def __init__(self, msg: Message, context: Context, model: nn.Module) -> None:
        self._msg, self._model = msg, model
        self.plan, server_round = read_plan(msg.content)
        if self.plan.weights != AS_BUILT:
            initialise(model, self.plan.weights)
        self.method = self.plan.build(model)
        private = bool(context.node_config.get("private", False))
        self.turn = Turn(self.plan.seed, server_round, self.plan.rounds, client_number(context), private)
        self.masks = structure_id(model)
        if self.plan.masks and self.masks != self.plan.masks:
            raise WireError(
                f"this device's network has structural masks {self.masks or '(none)'}, the server's "
                f"{self.plan.masks}: build the model with the same arguments and mask seed on both ends"
            )
        self._digest = model_digest(self.method.spec, model)
        self._disk = DeviceMemory(memory_folder(context), self.plan.identity(self._digest), self.turn.client)
        # What a round's evaluation may know, its training does not yet: a repeated round must repeat.
        self._memory = self._disk.recall(server_round + (msg.metadata.message_type.partition(".")[0] == "evaluate"))
        frame = frame_of(msg.content.array_records.get(ARRAYS))
        got = read_broadcast(frame, self.method, self._memory, digest=self._digest, round_=server_round)
        self._got = self.method.complete(got, self.turn, self._memory)
        self._optimizer: Optimizer | None = None

    def optimizer(self, lr: float | None = None, name: str | None = None) -> Optimizer:
        """Write the round's start into the model and return its optimiser.

        ``lr`` and ``name`` ("adam" or "sgd") default to what the server says.
        """
        training = self.plan.training(lr, name)
        self._optimizer = self.method.begin(self._got, self._model, training, self.turn, self._memory)
        return self._optimizer

    @property
    def tasks(self) -> tuple[int, ...]:
        """Tasks for which this device has a network of its own, ascending; (): it has one for all."""
        return self.method.tasks(self._memory)

    @property
    def marks(self) -> dict[int, int]:
        """Which task of this device's own a number stands for that ``mark`` was told."""
        named = {name: value for name, value in self._memory.items() if name.startswith(MARK)}
        return {int(name.removeprefix(MARK)): int(value[0]) for name, value in named.items()}

    def mark(self, number: int) -> None:
        """Note under which ``number`` others, such as a scenario, know the present task; after ``optimizer``."""
        if self.tasks:
            self._memory[f"{MARK}{number}"] = np.array(self.tasks[-1:], np.int64)

    def observe(self, losses: Tensor) -> bool:
        """Tell the method the loaded network's losses on what it is to be trained on, (n,) nats.

        Before ``optimizer``. Returns whether that is another task than before, which then begins.
        """
        return self.method.observe(losses.double().cpu().numpy(), self.turn, self._memory)

    def load(self, mode: Mode = "threshold", task: int | None = None) -> nn.Module:
        """Write this device's network into the model, for evaluation: its own, where the method is personal.

        ``task`` is one of ``tasks``; None: the latest.
        """
        if self.method.modes and mode not in self.method.modes:
            mode = self.method.modes[0]
        key = derive(self.turn.seed, "evaluate", self.turn.round, self.turn.client)
        frozen = frozen_weights(self._model, self.method.spec)
        self.method.install(self._got, self._model, frozen, View(mode, key, self._memory, task))
        return self._model

    def adapt(self, lr: float | None = None, name: str | None = None) -> Optimizer:
        """Return an optimiser to fine-tune the loaded network with, on this device's own data, before it evaluates.

        Raises
        ------
        ValueError
            When the method has no such step.
        """
        training = self.plan.training(lr, name)
        optimizer = self.method.adapt(self._got, self._model, training, self.turn, self._memory)
        if optimizer is None:
            raise ValueError(f"method {self.plan.method} does not adapt before it evaluates: set adapt-epochs to 0")
        return optimizer

    def reply(self, num_examples: int, metrics: Mapping[str, float] | None = None) -> Message:
        """Return what was learned as one frame, once the device's memory is on its disk."""
        if self._optimizer is None:
            raise RuntimeError("reply() before optimizer(): nothing was trained")
        payload = self.method.finish(self._got, self._model, self._optimizer, self.turn, self._memory)
        # Packed first: a turn whose reply cannot be sent (a loss that is no number) must not be remembered.
        frame = pack(
            payload,
            digest=self._digest,
            round_=self.turn.round,
            known=self.method.known(self._got, self.turn, self._memory),
            codecs=self.plan.codecs(self.method),
        )
        if self._memory:
            self._disk.keep(self.turn.round, self._memory)
        content = RecordDict({ARRAYS: frame_record(frame, self.method.numel)})
        return self._answer(content, num_examples, metrics)

    def report(self, num_examples: int, metrics: Mapping[str, float]) -> Message:
        """Return metrics alone, after an evaluation."""
        figures = {**self.method.report(self._got, self._memory), **metrics}
        return self._answer(RecordDict(), num_examples, figures)

    def _answer(self, content: RecordDict, examples: int, metrics: Mapping[str, float] | None) -> Message:
        values = {name: float(value) for name, value in (metrics or {}).items()}
        if self.masks:
            content[CONFIG] = ConfigRecord({MASKS: self.masks})
        content[METRICS] = MetricRecord({**values, "num-examples": int(examples), "client": self.turn.client})
        return Message(content, reply_to=self._msg)


def safely(handler: Handler) -> Handler:
    """Always answer: an exception or a forgotten return becomes an error reply.

    A handler that returns None would make its SuperNode wait for ever, through all later runs.
    """

    @wraps(handler)
    def answer(msg: Message, context: Context) -> Message:
        try:
            reply = handler(msg, context)
        except (Exception, SystemExit) as error:  # a data loader that exits must not silence its node
            log(ERROR, "%s failed", handler.__name__, exc_info=True)
            return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=msg)
        if not isinstance(reply, Message):
            log(ERROR, "%s returned %s instead of a Message", handler.__name__, type(reply).__name__)
            return Message(Error(RAISED, f"{handler.__name__} returned {type(reply).__name__}"), reply_to=msg)
        return reply

    return answer


def identify(msg: Message, context: Context) -> Message:
    """Answer a "query" message with the client's stable number."""
    return Message(RecordDict({METRICS: MetricRecord({"client": client_number(context)})}), reply_to=msg)


def client_number(context: Context) -> int:
    """The device's own stable number: ``client-id`` or ``partition-id`` of its node config, else the node id."""
    for key in ("client-id", "partition-id"):
        if key in context.node_config:
            return int(context.node_config[key])
    return context.node_id


def memory_folder(context: Context) -> Path:
    """Where this device keeps its memory: ``memory-dir`` of its node config or of the run config."""
    told = context.node_config.get("memory-dir") or context.run_config.get("memory-dir")
    return Path(str(told)).expanduser().absolute() if told else default_folder()
