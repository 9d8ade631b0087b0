"""The memory table of the FedMask paper (Table 5, image classification) from this project's own size accounting.

    python benchmarks/fedmask_memory.py

VGG-16 (torchvision's, fully connected layers of ImageNet's size) with 10 and 64 outputs, pruned by FedMask's own
rule with random importances: which weights go does not matter to the size, only how many. MB are 10^6 bytes. The
paper does not say how much it prunes: 0.36 of the fully connected layers is what its figures amount to.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models import vgg16

from fedmask_flwr.masks import MaskSpec
from fedmask_flwr.methods.base import count_floats
from fedmask_flwr.methods.fedmask import FedMaskConfig, keep_largest
from fedmask_flwr.wire import Payload, SideInfo, pack, pack_bits

RESULTS = Path(__file__).parent / "results/fedmask_memory.json"
PAPER = {"CIFAR-10": (10, 537.21, 365.30, 16.78), "EMNIST": (64, 538.09, 364.72, 16.82)}  # slides, OCR


def megabytes(bits):
    return bits / 8 / 1e6


def row(name, outputs):
    with torch.device("meta"):
        model = vgg16(num_classes=outputs)
    spec, floats = MaskSpec.of(model), count_floats(model)
    config = FedMaskConfig(prune=0.36, prune_layers=3)
    importance = np.random.Generator(np.random.Philox(key=outputs)).random(spec.numel, np.float32)
    support = keep_largest(importance, spec, config)
    kept = int(support.sum())
    # The file that names what is active: half of the support, as a frame.
    active = support & (importance > 0.5)
    known = SideInfo(spec.sizes)
    frame = pack(Payload(bits={"mask": pack_bits(active)}), digest=bytes(8), round_=0, known=known)
    return {
        "model": f"VGG-16, {outputs} outputs",
        "task": name,
        "parameters": floats,
        "fp32_mb": megabytes(32 * floats),
        "kept": kept / spec.numel,
        "fedmask_fp32_mb": megabytes(32 * (kept + floats - spec.numel)),
        "bit_per_parameter_mb": megabytes(floats),
        "seed_and_mask_mb": len(frame) / 1e6,
    }


def main():
    rows = []
    print(
        f"{'':10} {'fp32':>8} {'paper':>8} | {'FedMask':>8} {'paper':>8} | {'1 bit':>7} {'paper':>7} | seed + mask"
    )
    for name, (outputs, dense, fedmask, binary) in PAPER.items():
        r = row(name, outputs)
        rows.append(r | {"paper_fp32_mb": dense, "paper_fedmask_mb": fedmask, "paper_bnn_mb": binary})
        print(
            f"{name:10} {r['fp32_mb']:8.2f} {dense:8.2f} | {r['fedmask_fp32_mb']:8.2f} {fedmask:8.2f} | "
            f"{r['bit_per_parameter_mb']:7.2f} {binary:7.2f} | {r['seed_and_mask_mb']:.2f} MB, {r['kept']:.3f} kept"
        )
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
