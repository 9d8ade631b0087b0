"""The bundled ServerApp and ClientApp: a run config in, a run folder out."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid
from torch import nn

from fedmask_flwr import data
from fedmask_flwr.config import RunConfig, load_config, patterns
from fedmask_flwr.masks import Backbone
from fedmask_flwr.models import backbone
from fedmask_flwr.partition import partition
from fedmask_flwr.track import RunDir
from fedmask_flwr.train import device_of, evaluate, tensors, train

from .client import MaskTurn
from .records import AS_BUILT
from .strategy import MaskStrategy


def serve(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes.

    Raises
    ------
    ConfigError, DataError, RunDirError, CheckpointError, TimeoutError
        Each with the fix in its message; Flower marks the run as failed.
    """
    config, settings = load_config(context.run_config)
    test = data.load(config.data, "test", config.data_dir)
    device = device_of(config.device)
    model = _backbone(config, test).build().to(device)
    run_dir = RunDir(Path(config.out or f"runs/{context.run_id}").absolute(), context.run_config)
    try:
        strategy = MaskStrategy(
            config.method,
            model,
            weights=AS_BUILT,
            include=patterns(config.include),
            exclude=patterns(config.exclude),
            codec=config.codec,
            seed=config.seed,
            fraction_train=config.fraction_train,
            fraction_evaluate=config.fraction_evaluate,
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
    config, own, model = _device(context, "train")
    device = device_of(config.device)
    turn = MaskTurn(msg, context, model.to(device))
    optimizer = turn.optimizer(config.lr, config.optimizer)
    x, y = tensors(own.x, own.y, device)
    key = (config.seed, turn.turn.round, turn.turn.client)
    batch_size = config.batch_size or min(max(len(y) // 8, 32), 128)
    loss = train(model, optimizer, x, y, epochs=config.local_epochs, batch_size=batch_size, key=key)
    return turn.reply(len(y), {"train_loss": loss})


def evaluate_turn(msg: Message, context: Context) -> Message:
    """A client's "evaluate": the thresholded network on its own test data."""
    config, own, model = _device(context, "test")
    device = device_of(config.device)
    turn = MaskTurn(msg, context, model.to(device))
    loss, accuracy = evaluate(turn.load("threshold"), *tensors(own.x, own.y, device))
    return turn.report(len(own), {"loss": loss, "accuracy": accuracy})


def _device(context: Context, split: data.Split) -> tuple[RunConfig, data.Dataset, nn.Module]:
    config, _ = load_config(context.run_config)
    torch.set_num_threads(config.threads)  # two were 5-8 times slower when both cores train
    node = context.node_config
    # A device that says where its data lies keeps it whole; others share the named set by partition.
    own_dir = node.get("data-dir")
    name = str(node.get("data", config.data))
    whole = data.load(name, split, str(own_dir or config.data_dir))
    if own_dir is None and "partition-id" in node:
        whole = _share(whole, config, int(node["partition-id"]), int(node["num-partitions"]))
    return config, whole, _backbone(config, whole).build()


def _share(whole: data.Dataset, config: RunConfig, index: int, parts: int) -> data.Dataset:
    rows = partition(
        whole.y,
        parts,
        config.partition,
        alpha=config.alpha,
        classes_per_client=config.classes_per_client,
        seed=config.seed,
    )[index]
    return data.Dataset(whole.x[rows], whole.y[rows], whole.num_classes)


def _backbone(config: RunConfig, examples: data.Dataset) -> Backbone:
    return backbone(config.model, config.weights_source, examples.in_shape, examples.num_classes)
