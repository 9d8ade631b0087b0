"""The bundled ServerApp and ClientApp: a run config in, a run folder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from torch import nn

from fedmask_flwr import data
from fedmask_flwr.config import ConfigError, load_config, patterns
from fedmask_flwr.plan import AS_BUILT
from fedmask_flwr.track import RunDir
from fedmask_flwr.train import device_of, evaluate, tensors

from .client import MaskTurn
from .device import Device, build
from .strategy import MaskStrategy


def serve(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes.

    Raises
    ------
    ConfigError, DataError, RunDirError, CheckpointError, TimeoutError
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
    test = data.load(config.data, "test", config.data_dir)
    device = device_of(config.device)
    model = build(config, test).to(device)
    run_dir = RunDir(folder, flat)
    try:
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
            fraction_evaluate=config.fraction_evaluate,
            evaluate_every=config.evaluate_every,
            min_nodes=config.min_nodes,
            clients=config.clients,
            node_timeout=config.node_timeout,
            run_dir=run_dir,
            **settings,
        )
        x, y = tensors(test.x, test.y, device)

        def measure(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            return MetricRecord(dict(evaluate_modes(strategy, model, arrays, x, y, config.eval_samples)))

        strategy.start(grid, num_rounds=config.num_server_rounds, timeout=config.round_timeout, evaluate_fn=measure)
    finally:
        run_dir.close()


def evaluate_modes(
    strategy: MaskStrategy,
    model: nn.Module,
    arrays: ArrayRecord,
    x: torch.Tensor,
    y: torch.Tensor,
    samples: int,
) -> dict[str, float]:
    """Accuracy in every mode ("sampled" is the mean of ``samples`` networks), and the thresholded one's loss.

    A method with one network has the same accuracy in all modes.
    """
    modes = strategy.method.modes
    if not modes:  # nothing on the server to evaluate
        return {}
    measured = {}
    for mode in modes:
        draws = range(samples if mode == "sampled" else 1)
        pairs = [evaluate(strategy.load(model, arrays, mode, draw), x, y) for draw in draws]
        measured[mode] = tuple(sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    line = {
        f"accuracy_{mode}": measured.get(mode, measured[modes[0]])[1]
        for mode in ("sampled", "threshold", "expected")
    }
    return {**line, "loss": measured.get("threshold", measured[modes[0]])[0]}


def train_turn(msg: Message, context: Context) -> Message:
    """A client's "train": its own data, the standard loop, one frame back."""
    device = Device(msg, context)
    turn = MaskTurn(msg, context, device.model)
    loss = device.train(turn.optimizer(), turn.turn, device.config.local_epochs)
    return turn.reply(len(device.examples("train")), {"train_loss": loss})


def evaluate_turn(msg: Message, context: Context) -> Message:
    """A client's "evaluate": its network on its own test data, fine-tuned first where the run says so."""
    device = Device(msg, context)
    turn = MaskTurn(msg, context, device.model)
    model = turn.load("threshold")
    epochs = device.config.adapt_epochs
    if epochs := turn.method.adapt_epochs if epochs < 0 else epochs:
        device.train(turn.adapt(), turn.turn, epochs, "adapt")
    loss, accuracy = evaluate(model, *device.tensors("test"))
    return turn.report(len(device.examples("test")), {"loss": loss, "accuracy": accuracy})
