"""Write cuts of CIFAR-10 (JPEG q75) and MNIST as activations of pretrained networks, and the tails' checkpoints.

    python benchmarks/pretrained/prepare.py --data ../shared/data --out DIR

DIR/<net>/{train,test}.npz: what the network's tail is given (n, channels, height, width), float32, and labels.
DIR/<net>-held/: the same training images, and for `test` other *training* images, to choose settings on.
DIR/<net>.safetensors: the tail with a new head of ten classes, all zeros.

mobilenetv2, trained on ImageNet, is shown CIFAR-10 at 64 pixels (bilinear, rgb/127.5 - 1) and cut before
features.17. resnet20, trained on CIFAR-10, is shown MNIST (grey in all three channels, black margin to 32 pixels),
another task than its own, and cut before layer3. Both tails are compared with the whole networks first.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

from benchmarks.compare.prepare import reader  # noqa: E402
from benchmarks.pretrained.nets import before, mobilenetv2, resnet20  # noqa: E402

BUILDERS = {"mobilenetv2": mobilenetv2, "resnet20": resnet20}
FIRST = {"mobilenetv2": 17, "resnet20": 3}
HEADS = {"mobilenetv2": "classifier.1", "resnet20": "linear"}
PIXELS = 64
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # resnet20 was trained with ImageNet's
CLASSES = 10
SIZES = {
    "mobilenetv2": {"train": 2000, "held": 1000, "test": 2000},
    "resnet20": {"train": 1000, "held": 1000, "test": 2000},
}


def cut(n_train: int, n_test: int, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Rows of each part, without replacement: ``train`` and ``held`` of the training set, ``test`` of the other.

    Raises
    ------
    SystemExit
        There are fewer images than that.
    """
    if sizes["train"] + sizes["held"] > n_train or sizes["test"] > n_test:
        raise SystemExit(f"there are {n_train} and {n_test} images, {sizes} are asked for: ask for fewer")
    rng = np.random.default_rng(seed)
    order, other = rng.permutation(n_train), rng.permutation(n_test)
    end = sizes["train"] + sizes["held"]
    return {"train": order[: sizes["train"]], "held": order[sizes["train"] : end], "test": other[: sizes["test"]]}


def pixels(kind: str, images: np.ndarray) -> Tensor:
    """uint8 (n, 32, 32, 3), or (n, 28, 28), as the network wants them, (n, 3, height, width)."""
    if kind == "mobilenetv2":
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float()
        return interpolate(x / 127.5 - 1, PIXELS, mode="bilinear", align_corners=False)
    x = pad(torch.tensor(images).float(), (2, 2, 2, 2))[:, None].expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (x / 255 - mean) / std


def whole(kind: str, load, folder: Path) -> nn.Module:
    """The pretrained network with its own head, in evaluation mode."""
    if kind == "mobilenetv2":
        net, state = mobilenetv2((3, PIXELS, PIXELS), 1000), load.mobilenet_v2_state()
    else:
        net = resnet20((3, 32, 32), CLASSES)
        file = next((folder / "resnet_cifar10").glob("resnet20-*.th"))
        state = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
        state = {name.removeprefix("module."): t for name, t in state.items()}
    net.load_state_dict(state)
    return net.eval()


def tail(kind: str, net: nn.Module, in_shape: tuple[int, ...]) -> nn.Module:
    """The end of ``net``, with a head of ten classes."""
    end = BUILDERS[kind](in_shape, CLASSES, FIRST[kind])
    own = end.state_dict()
    state = {name: t for name, t in net.state_dict().items() if name in own and not name.startswith(HEADS[kind])}
    end.load_state_dict(state | {name: torch.zeros_like(t) for name, t in own.items() if name not in state})
    return end.eval()


@torch.no_grad()
def check(kind: str, net: nn.Module, x: Tensor) -> None:
    """The tail of the activations must be the whole network: same features, bit for bit."""
    mid = before(net, kind, FIRST[kind], x)
    end = BUILDERS[kind](mid.shape[1:], 1000 if kind == "mobilenetv2" else CLASSES, FIRST[kind]).eval()
    end.load_state_dict({name: t for name, t in net.state_dict().items() if name in end.state_dict()})
    if not torch.equal(end(mid), net(x)):
        raise SystemExit(f"{kind}: the tail is not the end of the whole network")


def activations(kind: str, net: nn.Module, images: np.ndarray) -> np.ndarray:
    """Activations before the first trained block, a batch at a time."""
    parts = [before(net, kind, FIRST[kind], pixels(kind, images[a : a + 100])) for a in range(0, len(images), 100)]
    return torch.cat(parts).numpy()


def write(kind: str, load, data: Path, out: Path, sizes: dict[str, int], seed: int) -> None:
    net = whole(kind, load, data)
    read = load.cifar10 if kind == "mobilenetv2" else load.mnist
    sets = {split: read(split) for split in ("train", "test")}
    check(kind, net, pixels(kind, sets["train"][0][:8]))
    rows = cut(len(sets["train"][1]), len(sets["test"][1]), sizes, seed)
    shape: tuple[int, ...] = ()
    for part, name in (("train", f"{kind}/train"), ("test", f"{kind}/test"), ("held", f"{kind}-held/test")):
        images, labels = sets["test" if part == "test" else "train"]
        x, y = activations(kind, net, images[rows[part]]), labels[rows[part]].astype(np.int64)
        path = out / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, x=x, y=y, num_classes=np.int64(CLASSES))
        shape = x.shape[1:]
        print(f"{path}: x {x.shape}, {path.stat().st_size / 1e6:.0f} MB, classes {np.bincount(y).tolist()}")
    again = out / f"{kind}-held/train.npz"
    again.unlink(missing_ok=True)
    os.link(out / f"{kind}/train.npz", again)
    save_file(tail(kind, net, shape).state_dict(), out / f"{kind}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with load.py and the data")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--nets", default=",".join(BUILDERS))
    for part in ("train", "held", "test"):
        parser.add_argument(f"--{part}", type=int, help="images")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = reader(args.data)
    for kind in args.nets.split(","):
        sizes = {part: getattr(args, part) or n for part, n in SIZES[kind].items()}
        write(kind, load, args.data, args.out, sizes, args.seed)


if __name__ == "__main__":
    main()
