"""A device of the bundled app: its own examples, the network, the standard loop."""

from __future__ import annotations

from functools import cached_property

import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr import data
from fedmask_flwr.config import RunConfig, kebab, load_config
from fedmask_flwr.methods import Turn
from fedmask_flwr.models import backbone
from fedmask_flwr.share import share
from fedmask_flwr.train import device_of, tensors, train

from .records import read_plan


class Device:
    """What one client has, by its run config and node config.

    A device that says where its data lies (``data-dir`` of its node config) keeps it whole; others share the
    named set by partition.
    """

    def __init__(self, msg: Message, context: Context) -> None:
        plan, _ = read_plan(msg.content)
        # The server may run several methods, settings and seeds one after another.
        own = {kebab(name): value for name, value in plan.settings.items()}
        config, _ = load_config({**context.run_config, "method": plan.method, **own})
        self.config = config.model_copy(update={"seed": plan.seed})
        self._node = context.node_config
        self._on = device_of(config.device)
        torch.set_num_threads(config.threads)  # two were 5-8 times slower when both cores train

    @cached_property
    def model(self) -> nn.Module:
        """The network with its named weights."""
        return build(self.config, self.examples("train")).to(self._on)

    def examples(self, split: data.Split) -> data.Dataset:
        """Give the training or test data of this device."""
        own_dir, config = self._node.get("data-dir"), self.config
        name = str(self._node.get("data", config.data))
        where = str(own_dir or config.data_dir)
        whole = data.load(name, split, where)
        if own_dir is not None or "partition-id" not in self._node:
            return whole
        rows = share(
            data.load(name, "train", where),
            whole if split == "test" else None,
            split,
            int(self._node["partition-id"]),
            int(self._node["num-partitions"]),
            config.partition,
            alpha=config.alpha,
            classes_per_client=config.classes_per_client,
            seed=config.seed,
        )
        return data.Dataset(whole.x[rows], whole.y[rows], whole.num_classes)

    def tensors(self, split: data.Split) -> tuple[Tensor, Tensor]:
        """``examples`` on the device that computes: x (n, *in_shape) and y (n,)."""
        own = self.examples(split)
        return tensors(own.x, own.y, self._on)

    def train(self, optimizer: Optimizer, turn: Turn, epochs: int, *purpose: str) -> float:
        """Train the model for ``epochs``; return the mean loss in nats."""
        x, y = self.tensors("train")
        batch_size = self.config.batch_size or min(max(len(y) // 8, 32), 128)
        key: tuple[int | str, ...] = (self.config.seed, turn.round, turn.client, *purpose)
        return train(self.model, optimizer, x, y, epochs=epochs, batch_size=batch_size, key=key)


def build(config: RunConfig, examples: data.Dataset) -> nn.Module:
    """Build the network of the run config for such examples, with its named weights."""
    source = config.weights_source
    return backbone(config.model, source, examples.in_shape, examples.num_classes).build()
