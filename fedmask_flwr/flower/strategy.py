"""``MaskStrategy``: any method as an ordinary Flower strategy, with failures counted and rounds resumed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedmask_flwr.masks import Mode, frozen_weights, initialise, model_digest
from fedmask_flwr.methods import Turn, Update, resolve
from fedmask_flwr.plan import AS_BUILT, Plan
from fedmask_flwr.setting import structure_id
from fedmask_flwr.track import RunDir
from fedmask_flwr.wire import Payload, SideInfo, WireError

from .herald import Herald
from .journal import Journal
from .ledger import Ledger, brief, spread, weighted_means
from .networks import Networks
from .patience import Patience
from .prompt import meanwhile, prompt
from .replies import answers, destinations, integer, measured, read_updates, released, same_masks
from .roster import Roster

INFO, ERROR = 20, 40
EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class MaskStrategy(Strategy):
    """Federate masks of ``model`` with a method of this package, or your own.

    Parameters
    ----------
    method
        A built-in method such as "deltamask", or "package.module:Class".
    model
        The network; clients build the same. Its weights are set from ``weights`` on both ends.
    weights
        "seed:N" (default: the run's seed), "file:PATH#sha256=HEX", or "as-built": both ends make equal weights.
    include, exclude
        Patterns of parameter names to mask.
    codec
        Codec of the uplink bits; "auto" takes the smallest exact one.
    optimizer, lr
        What clients train with ("adam" or "sgd"); no ``lr`` means the method's own.
    fraction_train, fraction_evaluate
        Share of nodes that train, and that evaluate, in a round.
    evaluate_every
        Rounds between two evaluations on nodes; the last round is always one.
    min_nodes, node_timeout
        Nodes to wait for, and how many seconds.
    clients
        Nodes to wait for before the first round, when more than ``min_nodes``.
    same_masks
        Whether clients whose network has other structural masks (of a MADE) than this one's are refused.
    max_silent_rounds
        Rounds in a row without one usable reply that end the run with an error (0: none does).
    server_threads
        Replies that are decoded at a time; each takes some bytes a parameter while it is.
    run_dir
        Where to record rounds and checkpoint the state; a run with a checkpoint there goes on from it.
    on_round
        Called with each round's line of metrics once it is complete.
    **settings
        The method's own settings, such as ``kappa=0.5``.

    Raises
    ------
    ValueError
        For an unknown method, setting or pattern.
    """

    def __init__(
        self,
        method: str,
        model: nn.Module,
        *,
        weights: str | None = None,
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
        codec: str = "auto",
        optimizer: str = "adam",
        lr: float | None = None,
        seed: int = 7,
        fraction_train: float = 1.0,
        fraction_evaluate: float = 0.0,
        evaluate_every: int = 1,
        min_nodes: int = 2,
        clients: int = 0,
        same_masks: bool = True,
        node_timeout: float = 600.0,
        max_silent_rounds: int = 3,
        server_threads: int = 1,
        run_dir: RunDir | None = None,
        on_round: Callable[[Mapping[str, Any]], None] | None = None,
        **settings: Any,
    ) -> None:
        resolve(method).Config(**settings)
        if server_threads < 1:
            raise ValueError(f"server_threads must be 1 or more, got {server_threads}")
        source = f"seed:{seed}" if weights is None else weights
        run = secrets.token_hex(8) if run_dir is None else run_dir.token()
        masks = structure_id(model) if same_masks else ""
        self.plan = Plan(method, settings, source, include, exclude, seed, 0, codec, optimizer, lr, run, masks)
        self.plan.training()
        self.plan.check_codec()
        if source != AS_BUILT:
            initialise(model, source)
        self.method = self.plan.build(model, fraction_train)
        self.spec = self.method.spec
        self.digest = model_digest(self.spec, model)
        self.roster = Roster(min_nodes=min_nodes, expect=clients, node_timeout=node_timeout, seed=seed)
        # A method without a network on the server would otherwise never be evaluated.
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate or (0.0 if self.method.modes else 1.0)
        self.evaluate_every = evaluate_every
        self.max_silent_rounds = max_silent_rounds
        self.server_threads = server_threads
        self.run_dir = run_dir
        self._journal = Journal(run_dir, self.digest, on_round)
        self.state = self.method.init()
        self.ledger = Ledger()
        self._sent: list[Message] = []
        self._silent = 0
        self._asked: list[Message] = []
        self._herald = Herald(self.method, self.digest)
        self.networks = Networks(self.method, self.plan, self.digest, frozen_weights(model, self.spec))

    # What the state looks like from outside

    def result_frame(self, server_round: int) -> bytes:
        """The final mask (or weights) as one frame that can be read without this strategy."""
        # One layer: a reader needs to know nothing but the number of bits.
        one = SideInfo((self.spec.numel,))
        return self._herald.coded(self.method.result(self.state), server_round, one)

    def initial_arrays(self) -> ArrayRecord:
        """Arrays to pass to ``start``; they are the strategy's own state."""
        return self._herald.arrays(self.state, 0)

    def load(self, model: nn.Module, arrays: ArrayRecord, mode: Mode = "threshold", sample: int = 0) -> nn.Module:
        """Write the network that ``arrays`` describe into ``model``: "sampled", "threshold" or "expected".

        ``model`` must be of the strategy's class; its weights are overwritten. Equal ``sample`` numbers draw
        equal networks.
        """
        return self.networks.install(self.networks.read(arrays), model, mode, sample)

    # Flower's strategy

    def summary(self) -> None:
        """Log what travels."""
        log(INFO, "\t├──> %s, %d of %d parameters", self.plan.method, self.method.numel, self.method.floats)
        log(INFO, "\t└──> frozen weights %s, uplink codec %s", self.plan.weights, self.plan.codec)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """One message a sampled node, each with records of its own."""
        self.state = self.method.advance(self.state, self._turn(server_round))
        self._sent = self._messages(grid, "train", self.fraction_train, server_round, config)
        self.ledger = Ledger(silent=self._silent)
        self.ledger.send(self._sent)
        return self._sent

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the readable replies into the state; unreadable ones are counted and logged."""
        nodes, self._sent = destinations(self._sent), []
        heard: list[int] = []
        updates = read_updates(
            replies,
            nodes,
            method=self.method,
            state=self.state,
            told=self._told(),
            clients=self.roster.told,
            spoke=self.roster.spoke,
            digest=self.digest,
            turn=self._turn(server_round),
            ledger=self.ledger,
            masks=self.plan.masks,
            lossy=self.plan.lossy,
            threads=self.server_threads,
        )
        self.state = self.method.aggregate(self.state, _noting(updates, heard))
        if self.method.personal:
            missed = {self.roster.told[node] for node in nodes.values()}.difference(heard)
            self.state = self.method.missed(self.state, sorted(missed))
        metrics = MetricRecord({**weighted_means(self.ledger.metrics), **self.ledger.line(self.method.numel)})
        return self._herald.arrays(self.state, server_round), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The new state to a sample of nodes; none by default, since it doubles the downlink."""
        due = server_round % self.evaluate_every == 0 or server_round == self.plan.rounds
        if self.fraction_evaluate == 0.0 or not due:
            return []
        self._asked = self._messages(grid, "evaluate", self.fraction_evaluate, server_round, config)
        self.ledger.ask(self._asked)
        return self._asked

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means over clients, weighted by examples; broken replies are counted and left out."""
        nodes, self._asked = destinations(self._asked), []
        metrics = []
        for node, reply in answers(replies, nodes):
            self.ledger.receive(reply)
            try:
                same_masks(reply, self.plan.masks)
                metrics.append((float(integer(reply, "num-examples")), measured(reply)))
            except WireError as error:
                log(ERROR, "evaluation of node %d dropped: %s", node, brief(error))
        self.ledger.evaluated = len(metrics)
        if not metrics:
            return None
        metrics.sort(key=lambda found: (found[0], *sorted(found[1].items())))  # no matter who was first
        return MetricRecord({**weighted_means(metrics), **spread(metrics, "accuracy")})

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run the rounds, as Flower's own strategies do, from the last checkpointed one.

        Over a network, a round is evaluated while devices train the next one: ``evaluate_fn`` is given its arrays,
        the strategy itself is a round ahead.

        Raises
        ------
        TimeoutError
            When too few nodes come.
        SilenceError
            After ``max_silent_rounds`` rounds in a row without one usable reply. The checkpoint is of the last
            round that had one.
        """
        grid = prompt(grid)
        self.plan = replace(self.plan, rounds=num_rounds)
        state, kept, unfinished = self._journal.resume(self.method.State)
        self.state = self.state if state is None else state
        first = kept + 1
        patience = Patience(min(self.max_silent_rounds, num_rounds), kept=kept)
        log(INFO, "Starting %s strategy at round %d of %d:", type(self).__name__, first, num_rounds)
        self.summary()
        result = Result()
        result.arrays = arrays = self._herald.arrays(self.state, first - 1)
        train_config, evaluate_config = train_config or ConfigRecord(), evaluate_config or ConfigRecord()
        if evaluate_fn and first == 1 and (measured := evaluate_fn(0, arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = measured
        if unfinished is not None:
            self._close(unfinished, self.state, arrays, evaluate_fn, result)
        replies = partial(grid.send_and_receive, timeout=timeout)
        for current in range(first, num_rounds + 1):
            began = time.monotonic()
            # Messages and replies get no name: they would stay in memory until the next round's come.
            aggregated, trained = self.aggregate_train(
                current, released(replies(self.configure_train(current, arrays, train_config, grid)))
            )
            arrays = aggregated or arrays
            result.arrays = arrays
            line: dict[str, Any] = {"round": current} | dict(trained or {}) | {"round": current}
            if trained is not None:
                result.train_metrics_clientapp[current] = trained
            if asked := self.configure_evaluate(current, arrays, evaluate_config, grid):
                answered = self.aggregate_evaluate(current, released(replies(asked)))
                asked = []
                line |= self.ledger.line(self.method.numel)
                if answered is not None:
                    result.evaluate_metrics_clientapp[current] = answered
                    line |= {f"client_{name}": value for name, value in answered.items()}
            line["seconds"] = round(time.monotonic() - began, 3)
            patience.look(current, self.ledger)
            last = patience.over or current == num_rounds
            # A silent round is not checkpointed: whoever starts the run again gets it again.
            if not patience.silent or (last and not patience.over):
                self._journal.keep(self.state, line)
            close = partial(self._close, line, self.state, arrays, evaluate_fn, result)
            if last:
                close()
            else:
                meanwhile(grid, close)
            if patience.over:
                raise patience.error()
        if self.run_dir is not None:
            try:
                self.run_dir.finish(self.result_frame(num_rounds))
            except OSError as error:
                log(ERROR, "the result was not saved (%s): free the disk and start the same run again", error)
        return result

    # Inside

    def _turn(self, server_round: int) -> Turn:
        return Turn(self.plan.seed, server_round, self.plan.rounds, 0)

    def _told(self) -> Callable[[int], Payload]:
        """What each client knows, once it has read its message of this round."""
        if self.method.personal:
            return partial(self.method.understood, self.state)
        same = self.method.broadcast(self.state)
        return lambda _: same

    def _messages(
        self, grid: Grid, kind: str, fraction: float, server_round: int, config: Mapping[str, Any]
    ) -> list[Message]:
        personal = self.plan.method if self.method.personal else ""
        told, silent = self.roster.audience(grid, fraction, kind, server_round, personal=personal)
        if personal:
            self._silent = silent
        return self._herald.messages(self.state, told, kind, self.plan, server_round, config)

    def _close(
        self, line: dict[str, Any], state: Any, arrays: ArrayRecord, evaluate_fn: EvaluateFn | None, result: Result
    ) -> None:
        """Complete a round that ended in ``state``."""
        if evaluate_fn and (measured := evaluate_fn(line["round"], arrays)) is not None:
            result.evaluate_metrics_serverapp[line["round"]] = measured
            line |= dict(measured)
        line |= self.method.figures(state)
        if "seconds" in line:  # as the line's last
            line["seconds"] = line.pop("seconds")
        self._journal.complete(line)


def _noting(updates: Iterable[Update], clients: list[int]) -> Iterator[Update]:
    for update in updates:
        clients.append(update.client)
        yield update
