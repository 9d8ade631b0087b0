"""CIFAR-10 (JPEG q75, from compare/prepare.py): the first 20,000 training images and the whole test set."""

from __future__ import annotations

from fedmask_flwr import data

TRAIN = 20_000


def cifar10(split, data_dir):
    """Images and labels of a split."""
    whole = data.load("npz", split, data_dir)
    rows = slice(TRAIN) if split == "train" else slice(None)
    return whole.x[rows], whole.y[rows]
