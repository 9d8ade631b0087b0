"""The bundled ServerApp and ClientApp: a run config in, a run folder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from torch import nn

from fedmask_flwr import data, heap
from fedmask_flwr.config import ConfigError, load_config, patterns
from fedmask_flwr.logs import use_json
from fedmask_flwr.plan import AS_BUILT
from fedmask_flwr.setting import network, scenario_of, settled, shape
from fedmask_flwr.track import RunDir
from fedmask_flwr.train import Losses, device_of, evaluate, losses_of, tensors

from .client import MaskTurn
from .continual import met
from .device import Device
from .strategy import EvaluateFn, MaskStrategy


def serve(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes.

    Raises
    ------
    ConfigError, DataError, RunDirError, CheckpointError, TimeoutError, SilenceError
        Each with the fix in its message; Flower marks the run as failed.
    """
    if context.run_config.get("seeds"):
        raise ConfigError("seeds are for a comparison: name methods in compare, or say seed")
    federate(grid, context.run_config, run_folder(context))


def run_folder(context: Context) -> Path:
    """Where a run, or a comparison of runs, writes: ``out`` of the run config."""
    return Path(str(context.run_config.get("out") or f"runs/{context.run_id}")).absolute()


def federate(grid: Grid, flat: Mapping[str, Any], folder: Path) -> None:
    """Run one federation into ``folder``, as ``serve`` does; ``flat`` is its run config."""
    config, settings = load_config(flat)
    heap.give_back()
    scenario = scenario_of(config)
    device = device_of(config.device)
    model = network(config, *shape(config)).to(device)
    if config.log_format == "json":
        use_json()
    run_dir, exporter = RunDir(folder, flat), None
    try:
        if config.metrics_port:
            from fedmask_flwr.metrics import Exporter  # which no device needs

            exporter = Exporter(
                config.metrics_port, config.metrics_address, method=config.method, rounds=config.num_server_rounds
            )
        strategy = MaskStrategy(
            config.method,
            model,
            weights=AS_BUILT,
            include=patterns(config.include),
            exclude=patterns(config.exclude),
            codec=config.codec,
            optimizer=config.optimizer,
            lr=config.lr,
            seed=config.seed,
            fraction_train=config.fraction_train,
            fraction_evaluate=config.fraction_evaluate or float(scenario is not None),
            evaluate_every=config.evaluate_every,
            min_nodes=config.min_nodes,
            clients=config.clients,
            same_masks=config.same_masks,
            node_timeout=config.node_timeout,
            max_silent_rounds=config.max_silent_rounds,
            server_threads=config.server_threads,
            run_dir=run_dir,
            on_round=exporter.round if exporter else None,
            **settled(config, settings),
        )
        measure = None  # in a scenario every client has tests of its own
        if scenario is None:
            test = data.load(config.data, "test", config.data_dir)
            measure = measuring(strategy, model, test, device, config.eval_samples)
        strategy.start(grid, num_rounds=config.num_server_rounds, timeout=config.round_timeout, evaluate_fn=measure)
    except Exception as error:
        run_dir.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        if exporter is not None:
            exporter.close()
        run_dir.close()


def measuring(
    strategy: MaskStrategy, model: nn.Module, test: data.Dataset, device: torch.device, samples: int
) -> EvaluateFn:
    """How the server evaluates what it broadcasts on the test data."""
    x, y = tensors(test.x, test.y, device)
    losses = losses_of(model, test)

    def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        with heap.kept():
            return MetricRecord(dict(evaluate_modes(strategy, model, arrays, x, y, samples, losses)))

    return measure


def evaluate_modes(
    strategy: MaskStrategy,
    model: nn.Module,
    arrays: ArrayRecord,
    x: torch.Tensor,
    y: torch.Tensor,
    samples: int,
    losses: Losses | None = None,
) -> dict[str, float]:
    """Accuracy in every mode ("sampled" is the mean of ``samples`` networks), and the thresholded one's loss.

    A method with one network has the same accuracy in all modes; a density model has none.
    """
    modes = strategy.method.modes
    if not modes:  # nothing on the server to evaluate
        return {}
    loss: dict[str, float] = {}
    accuracy: dict[str, float] = {}
    heard = strategy.networks.read(arrays)
    for mode in modes:
        draws = range(samples if mode == "sampled" else 1)
        pairs = [evaluate(strategy.networks.install(heard, model, mode, draw), x, y, losses) for draw in draws]
        loss[mode] = sum(value for value, _ in pairs) / len(pairs)
        if judged := [right for _, right in pairs if right is not None]:
            accuracy[mode] = sum(judged) / len(judged)
    line = {"loss": loss.get("threshold", loss[modes[0]])}
    if accuracy:
        for mode in ("sampled", "threshold", "expected"):
            line[f"accuracy_{mode}"] = accuracy.get(mode, accuracy[modes[0]])
    return line


def train_turn(msg: Message, context: Context) -> Message:
    """A client's "train": its own data, the standard loop, one frame back."""
    device = Device(msg, context)
    turn = MaskTurn(msg, context, device.model)
    if device.scenario is not None and device.config.task_identity == "found":
        turn.load()
        turn.observe(device.losses("train")[0])
    optimizer = turn.optimizer()
    if device.scenario is not None:
        turn.mark(device.task)
    loss = device.train(optimizer, turn.turn, device.config.local_epochs)
    return turn.reply(len(device.examples("train")), {"train_loss": loss})


def evaluate_turn(msg: Message, context: Context) -> Message:
    """A client's "evaluate": its network on its own test data, fine-tuned first where the run says so."""
    device = Device(msg, context)
    turn = MaskTurn(msg, context, device.model)
    if device.scenario is not None:
        return turn.report(1, met(device, turn))  # every client counts once, whatever its present task's size
    examples = len(device.examples("test"))
    turn.load("threshold")
    epochs = device.config.adapt_epochs
    if epochs := turn.method.adapt_epochs if epochs < 0 else epochs:
        device.train(turn.adapt(), turn.turn, epochs, "adapt")
    losses, right = device.losses("test")
    judged = {} if right is None else {"accuracy": float(right.double().mean())}
    return turn.report(examples, {"loss": float(losses.mean()), **judged})
