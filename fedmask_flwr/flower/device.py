"""A device of the bundled app: its own examples, the network, the standard loop."""

from __future__ import annotations

from functools import cached_property

import torch
from flwr.app import Context, Message
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmask_flwr import data, heap
from fedmask_flwr.config import ConfigError, kebab, load_config
from fedmask_flwr.logs import use_json
from fedmask_flwr.masks.lean import keep_compiler_out
from fedmask_flwr.methods import Turn
from fedmask_flwr.setting import network, scenario_of
from fedmask_flwr.share import share
from fedmask_flwr.train import STEPS, device_of, each, losses_of, tensors, train

from .client import client_number
from .records import read_plan

OWN_MASKS = 1 << 16  # seeds of structural masks that differ from device to device


class Device:
    """What one client has, by its run config and node config.

    A device that says where its data lies (``data-dir`` of its node config) keeps it whole; others share the
    named set by partition, or have their cells of the run's scenario.
    """

    def __init__(self, msg: Message, context: Context) -> None:
        plan, self.round = read_plan(msg.content)
        # The server may run several methods, settings and seeds one after another.
        own = {kebab(name): value for name, value in plan.settings.items()}
        config, _ = load_config({**context.run_config, "method": plan.method, **own})
        self.config = config.model_copy(update={"seed": plan.seed, "num_server_rounds": plan.rounds})
        self._node, self._number = context.node_config, client_number(context)
        self._on = device_of(config.device)
        keep_compiler_out()
        heap.keep()
        if config.log_format == "json":
            use_json()
        torch.set_num_threads(config.threads)  # two were 5-8 times slower when both cores train

    @cached_property
    def model(self) -> nn.Module:
        """The network with its named weights."""
        masks = None if self.config.same_masks else OWN_MASKS + self._number % OWN_MASKS
        if self.scenario is not None:
            whole = self.examples("train")
            in_shape, num_classes = whole.in_shape, whole.num_classes
        else:
            in_shape, num_classes = data.form(self._set, "train", self._where)
        return network(self.config, in_shape, num_classes, masks).to(self._on)

    @property
    def _set(self) -> str:
        return str(self._node.get("data", self.config.data))

    @property
    def _where(self) -> str:
        return str(self._node.get("data-dir") or self.config.data_dir)

    @cached_property
    def scenario(self) -> data.Scenario | None:
        """The continual federation that this device takes part in."""
        return scenario_of(self.config)

    @property
    def task(self) -> int:
        """The task whose data this device meets in this round, in a scenario."""
        assert self.scenario is not None
        return self.scenario.task_at(self._place, self.round, self.config.num_server_rounds)

    @property
    def _place(self) -> int:
        place = int(self._node.get("partition-id", self._number))
        assert self.scenario is not None
        if place >= self.scenario.clients:
            raise ConfigError(
                f"scenario {self.scenario.name} has {self.scenario.clients} clients, this one is number {place}: "
                "number them from 0 with partition-id"
            )
        return place

    def examples(self, split: data.Split, task: int | None = None) -> data.Dataset:
        """Give the training or test data of this device; in a scenario, of ``task`` (None: the present one)."""
        own_dir, config = self._node.get("data-dir"), self.config
        name, where = self._set, self._where
        if self.scenario is not None:
            all_so_far = config.stream == "cumulative" and split == "train"
            at = self.task if task is None else task
            return data.cell_data(self.scenario, self._place, at, split, where, config.seed, cumulative=all_so_far)
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
        return data.Dataset(whole.x[rows], whole.y[rows], whole.num_classes, None, whole.valid, whole.labels)

    def losses(self, split: data.Split, task: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Loss of the model on each example in nats (n,), and whether it is right (n,), None of a density."""
        own = self.examples(split, task)
        return each(self.model, *tensors(own.x, own.y, self._on), losses_of(self.model, own))

    def train(self, optimizer: Optimizer, turn: Turn, epochs: int, *purpose: str) -> float:
        """Train the model for ``epochs``; return the mean loss in nats."""
        own = self.examples("train")
        x, y = tensors(own.x, own.y, self._on)
        batch_size = self.config.batch_size or min(max(len(y) // 8, 32), 128)
        return train(
            self.model,
            optimizer,
            x,
            y,
            epochs=epochs,
            batch_size=batch_size,
            key=(self.config.seed, turn.round, turn.client, *purpose),
            losses=losses_of(self.model, own),
            phase=turn.round * STEPS,
        )
