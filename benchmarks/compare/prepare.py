"""Write HAPT (30 real users) and CIFAR-10 (JPEG q75) as the folders that the data set "npz" reads.

    python benchmarks/compare/prepare.py --data ../shared/data --out DIR

DIR/hapt/{train,test}.npz: windows (n, 6, 128) of 6 activities, step 64, with the user as `group`. Of each user and
activity the first 70 % of the windows, in time, are for training; the next one is dropped, since windows overlap by
half; the rest is for testing. Channels are standardised with the training windows of all users.
DIR/cifar10/{train,test}.npz: uint8 images (n, 3, 32, 32), the published split.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np

CLASSES = {"hapt": 6, "cifar10": 10}


def reader(folder):
    """The load.py of a data folder, as a module."""
    sys.dont_write_bytecode = True  # that folder is not ours
    spec = importlib.util.spec_from_file_location("load", folder / "load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split_in_time(users, labels):
    """Rows for training and rows for testing; the input is in time order within a user and activity."""
    train, test = [], []
    for user in np.unique(users):
        for label in np.unique(labels):
            rows = np.flatnonzero((users == user) & (labels == label))
            cut = len(rows) * 7 // 10
            if not 0 < cut < len(rows) - 1:
                raise SystemExit(f"user {user} has {len(rows)} windows of activity {label}; a split needs 4")
            train.append(rows[:cut])
            test.append(rows[cut + 1 :])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def hapt(load):
    x, y, users = load.hapt(window=128, step=64, classes=CLASSES["hapt"])
    x = np.ascontiguousarray(x.transpose(0, 2, 1), np.float32)
    train, test = split_in_time(users, y)
    mean = x[train].mean(axis=(0, 2), keepdims=True, dtype=np.float64)
    std = x[train].std(axis=(0, 2), keepdims=True, dtype=np.float64)
    x = ((x - mean) / std).astype(np.float32)
    return {name: {"x": x[r], "y": y[r], "group": users[r]} for name, r in (("train", train), ("test", test))}


def cifar10(load):
    found = {}
    for name in ("train", "test"):
        images, labels = load.cifar10(name)
        found[name] = {"x": np.ascontiguousarray(images.transpose(0, 3, 1, 2)), "y": labels}
    return found


def write(folder, splits, classes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in splits.items():
        path = folder / f"{name}.npz"
        np.savez(path, **arrays, num_classes=np.int64(classes))
        each = np.bincount(arrays["y"], minlength=classes).tolist()
        x, size = arrays["x"], path.stat().st_size / 1e6
        line = f"{path}: x {x.shape} {x.dtype}, {size:.1f} MB, classes {each}"
        if "group" in arrays:
            sizes = np.unique(arrays["group"], return_counts=True)[1]
            line += f", {len(sizes)} users of {sizes.min()} to {sizes.max()}"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with load.py, hapt/ and cifar10/")
    parser.add_argument("--out", required=True, type=Path)
    args = parser.parse_args()
    load = reader(args.data)
    for name, make in (("hapt", hapt), ("cifar10", cifar10)):
        write(args.out / name, make(load), CLASSES[name])


if __name__ == "__main__":
    main()
