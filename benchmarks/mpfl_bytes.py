"""The bandwidth table of the MPFL paper, from real frames.

    python benchmarks/mpfl_bytes.py

VGG-11 and ResNet-18 of torchvision, as the paper's; ten nodes search for eight rounds, prune-to 0.5. Votes are
random within the budget: which filters they name hardly matters to the size, as each is coded against the filters
that are left. A weights frame holds all floats of the network; "usual" is FedAvg for as many rounds, both ways.
What the slim network's own training costs after the search stands apart: "slim" is its share of the floats.

The paper says: less than 1 % of the usual bandwidth, and less than 1e-3 % on larger models and data. "arithmetic"
is a bit a convolution filter over 32 bits a float.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torchvision.models import resnet18, vgg11

from fedmask_flwr.aggregate import lowest
from fedmask_flwr.masks import MaskSpec, initialise
from fedmask_flwr.methods import Turn, Update
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.wire import Payload, pack, pack_bits, unpack_bits

RESULTS = Path(__file__).parent / "results/mpfl_bytes.json"
NODES, ROUNDS = 10, 8
WIDTHS = (13, 9, 13, 6, 13, 9, 10, 16, 9, 12, 6)
MODELS = {
    "VGG-11, 10 classes": (vgg11, 10),
    "VGG-11, 100 classes": (vgg11, 100),
    "ResNet-18, 10 classes": (resnet18, 10),
    "ResNet-18, 100 classes": (resnet18, 100),
}


def frame(payload, round_, known):
    return len(pack(payload, digest=bytes(8), round_=round_, known=known))


def search(method):
    """Bytes of every frame of a search: up by round and node, down by round."""
    state, rng, sizes = method.init(), np.random.default_rng(7), method.spec.sizes
    up, down = [], []
    for round_ in range(1, ROUNDS + 1):
        got = method.broadcast(state)
        down.append(frame(got, round_, method.heard({})))
        keep = unpack_bits(state.keep, method.spec.numel)
        updates, frames = [], []
        for node in range(NODES):
            vote = lowest((rng.random(keep.size),), keep, sizes, method.lost(round_))
            payload = Payload(bits={"vote": pack_bits(vote)})
            frames.append(frame(payload, round_, method.known(got, Turn(1, round_, ROUNDS, node), {})))
            updates.append(Update(node, payload, 1.0, 0.0))
        up.append(frames)
        state = method.aggregate(state, iter(updates))
    return up, down, state


def row(name):
    build, classes = MODELS[name]
    model = build(num_classes=classes, **({"init_weights": False} if build is vgg11 else {}))
    initialise(model, "seed:1")
    method = MPFL(MPFL.layout(model), model, MPFL.Config(search_rounds=ROUNDS))
    up, down, state = search(method)
    dense = frame(Payload(dense={"weights": method.start}), 1, None)
    slim = method.slim_numel(unpack_bits(state.keep, method.spec.numel))
    convs = sum(m.out_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    whole = sum(map(sum, up)) + NODES * sum(down)
    return {
        "model": name,
        "floats": method.floats,
        "slim_floats": slim,
        "conv_filters": convs,
        "votes": method.spec.numel,
        "rows_without_coupling": MaskSpec.of(model, granularity="filter").numel,
        "vote_frame_by_round": [max(frames) for frames in up],
        "keep_frame_by_round": down,
        "dense_frame": dense,
        "largest_vote_share": max(map(max, up)) / dense,
        "search_bytes": whole,
        "fedavg_bytes": 2 * NODES * ROUNDS * dense,
        "search_share": whole / (2 * NODES * ROUNDS * dense),
        "paper_arithmetic": convs / (32 * method.floats),
    }


def main():
    rows = [row(name) for name in MODELS]
    heads = ("floats", "filters", "vote B, 1st", "last", "weights B", "a vote", "search B", "usual B", "search")
    print(
        f"{'':22}" + "".join(f"{head:>{w}}" for head, w in zip((*heads, "arithmetic", "slim"), WIDTHS, strict=True))
    )
    for r in rows:
        votes = r["vote_frame_by_round"]
        cells = [f"{n:,}" for n in (r["floats"], r["votes"], votes[0], votes[-1], r["dense_frame"])]
        cells += [f"{r['largest_vote_share']:.1e}", f"{r['search_bytes']:,}", f"{r['fedavg_bytes']:,}"]
        cells += [
            f"{r['search_share']:.1e}",
            f"{r['paper_arithmetic']:.1e}",
            f"{r['slim_floats'] / r['floats']:.2f}",
        ]
        print(f"{r['model']:22}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, WIDTHS, strict=True)))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
