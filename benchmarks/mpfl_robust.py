"""What bad nodes do to MPFL's search: agreement with the clean consensus, for each rule.

    python benchmarks/mpfl_robust.py --data-dir ../shared/data/mnist

Ten nodes of MNIST, each with images of its own, search LeNet-5's filters over the Method API, without Flower. Then
some of them are replaced: by honest nodes with other images (the noise floor), by nodes whose pixels or labels are
permuted, that vote at random or the other way round, or that drop more than their budget (those are refused).
"untrained" prunes by the norms of the initial weights, without any data: how much of a search is known before it.
Agreement is the share of filters with the same fate as in the clean search of the same rule, Jaccard that of the
sets of pruned filters.

Nodes start from a network that was trained on images no node has (--start checkpoint: the paper starts from
ImageNet's), or from the package's signed constants, where all filters of a layer are equal in norm (--start seed).
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from fedmask_flwr import data
from fedmask_flwr.aggregate import lowest
from fedmask_flwr.masks import initialise, scatter
from fedmask_flwr.methods import Training, Turn, Update
from fedmask_flwr.methods.mpfl import MPFL
from fedmask_flwr.models import lenet5
from fedmask_flwr.train import train
from fedmask_flwr.wire import Payload, WireError, pack_bits, unpack_bits

RESULTS = Path(__file__).parent / "results/mpfl_robust.json"
NODES, RULES = 10, ("quota", "threshold", "released")
KINDS = ("other images", "pixels", "labels", "random", "inverted")
RUNS = [("", 0), *((kind, bad) for kind in KINDS for bad in (1, 3)), ("over budget", 3)]


class Bench:
    """One start and one seed: what every node does, remembered over the runs of all rules."""

    def __init__(self, x, y, args, start, seed):
        self.args, self.start, self.seed = args, start, seed
        self.x, self.y, self.rows = x, y, np.random.default_rng(seed).permutation(len(y))
        self.vote = cache(self.vote)
        self.initial = self.network().state_dict()

    def network(self):
        """The start, on both ends."""
        model = lenet5((1, 28, 28), 10)
        if hasattr(self, "initial"):
            model.load_state_dict(self.initial)
            return model
        initialise(model, f"seed:{self.seed}")
        if self.start == "checkpoint":
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                model = lenet5((1, 28, 28), 10)
            rows = torch.from_numpy(self.rows[-self.args.pretrain :])
            optimizer = torch.optim.Adam(model.parameters(), 1e-3)
            key = (self.seed, "pretrain")
            train(model, optimizer, self.x[rows], self.y[rows], epochs=8, batch_size=32, key=key)
        return model

    def method(self, rule):
        """MPFL with a filter of conv1 to lose."""
        model = self.network()
        config = MPFL.Config(rule=rule, search_rounds=self.args.rounds, keep_min=2, prune_to=self.args.prune_to)
        return MPFL(MPFL.layout(model), model, config)

    def images(self, kind, node):
        """A node's images and labels; node + 10 is who replaces it."""
        n = self.args.images
        rows = torch.from_numpy(self.rows[node * n : (node + 1) * n])
        x, y = self.x[rows], self.y[rows]
        if kind == "pixels":
            orders = np.stack([np.random.default_rng(i).permutation(28 * 28) for i in range(n)])
            x = x.flatten(1).gather(1, torch.from_numpy(orders)).reshape(x.shape)
        if kind == "labels":
            y = y[torch.from_numpy(np.random.default_rng([self.seed, node]).permutation(n))]
        return x, y

    def vote(self, kind, node, round_, kept):
        """The packed vote of a node; which rule will count it does not matter to it."""
        method, rng = self.method("quota"), np.random.default_rng([self.seed, node, round_])
        d = method.spec.numel
        keep = unpack_bits(np.frombuffer(kept, np.uint8), d)
        lost = method.lost(round_)
        if kind == "random":
            return pack_bits(lowest((rng.random(d),), keep, method.spec.sizes, lost))
        if kind == "over budget":
            return pack_bits(lowest((rng.random(d),), keep, method.spec.sizes, [n + 1 for n in lost]))
        got = Payload(bits={"keep": pack_bits(keep)}, meta={"searched": round_ - 1})
        model, turn = self.network(), Turn(self.seed, round_, self.args.rounds, node)
        optimizer = method.begin(got, model, Training("adam", self.args.lr), turn, {})
        x, y = self.images(kind, node)
        train(model, optimizer, x, y, epochs=self.args.epochs, batch_size=32, key=(self.seed, round_, node))
        if kind == "inverted":
            full = scatter(method.read(model), method.coupling, method.spec, keep)
            return pack_bits(lowest((-method.norms(full),), keep, method.spec.sizes, lost))
        return method.finish(got, model, optimizer, turn, {}).bits["vote"]

    def search(self, rule, kind="", bad=0):
        """Filters that are left (d,) after a search with ``bad`` nodes of a kind, and how many votes failed."""
        method = self.method(rule)
        state, refused = method.init(), 0
        for round_ in range(1, self.args.rounds + 1):
            updates = []
            for node in range(NODES):
                who = (kind, node + NODES) if node < bad else ("", node)
                vote = self.vote(*who, round_, state.keep.tobytes())
                update = Update(node, Payload(bits={"vote": vote}), 1.0, 0.0)
                try:
                    method.check(state, update)
                    updates.append(update)
                except WireError:
                    refused += 1
            state = method.aggregate(state, iter(updates))
        return unpack_bits(state.keep, method.spec.numel), refused

    def untrained(self):
        """What the initial weights alone say: no data."""
        method = self.method("quota")
        keep = np.ones(method.spec.numel, bool)
        return lowest((method.norms(method.start),), keep, method.spec.sizes, method.lost(self.args.rounds))


def measure(bench):
    """Rows of one start and one seed."""
    rows = []
    for rule in RULES:
        clean, _ = bench.search(rule)
        for kind, bad in RUNS:
            keep, refused = bench.search(rule, kind, bad) if bad else (clean, 0)
            rows.append(row(bench, rule, kind, bad, keep, clean) | {"refused": refused})
        rows.append(row(bench, rule, "untrained", 10, bench.untrained(), clean))
    return rows


def row(bench, rule, kind, bad, keep, clean):
    """One line of the results."""
    both, either = (~keep & ~clean).sum(), (~keep | ~clean).sum()
    found = {"start": bench.start, "seed": bench.seed, "rule": rule, "kind": kind, "bad": bad}
    found |= {"agreement": float((keep == clean).mean()), "jaccard": float(both / max(either, 1))}
    return found | {"pruned": float((~keep).mean())}


def table(rows, start):
    """Mean and range over seeds, as lines."""
    yield f"{'start ' + start:24} {'rule':10} {'agreement':>22} {'jaccard':>8} {'pruned':>7}"
    for kind, bad in [*RUNS, ("untrained", 10)]:
        for rule in RULES:
            found = [r for r in rows if (r["start"], r["rule"], r["kind"], r["bad"]) == (start, rule, kind, bad)]
            a = [r["agreement"] for r in found]
            spread = f"{mean(a):.1%} ({min(a):.1%}-{max(a):.1%})"
            jaccard, pruned = (mean(r[name] for r in found) for name in ("jaccard", "pruned"))
            yield f"{bad} x {kind or 'bad':20} {rule:10} {spread:>22} {jaccard:8.2f} {pruned:7.1%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--start", default="checkpoint,seed")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prune-to", type=float, default=0.5)
    parser.add_argument("--pretrain", type=int, default=2000, help="images that the checkpoint is trained on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    mnist = data.load("mnist", "train", args.data_dir)
    x, y = torch.from_numpy(mnist.x), torch.from_numpy(mnist.y)
    rows, began = [], time.monotonic()
    for start in args.start.split(","):
        for seed in map(int, args.seeds.split(",")):
            rows += measure(Bench(x, y, args, start, seed))
        print(*table(rows, start), sep="\n", flush=True)
    print(f"{time.monotonic() - began:.0f} s")
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("data_dir", "out")}
    args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
