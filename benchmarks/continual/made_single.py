"""MADE on one machine, against the published figures: test NLL (nats) of three binary sets.

    python benchmarks/continual/made_single.py --data-dir ../shared/data/debd

500 hidden ReLU units, direct weights and batches of 100, as in arXiv:1502.03509, but Adam, whose rate is
halved after every 5 epochs without a better validation NLL. A run stops after 30 such epochs and is judged by
its best one.
Decoupled weight decay and dropout of inputs are chosen from GRIDS by the validation split; only then is the test
split opened, once for each line of the table. dna is also done with several masks, which the steps take in turn and
over which evaluation averages: with the choice for one mask, and orders or connectivities chosen as above.

The published figures are of splits of the same sizes, but for dna (1400 / 600 there).
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fedmask_flwr.made import MADE
from fedmask_flwr.masks import derive, permutation

RESULTS = Path(__file__).parents[1] / "results/made.json"
PUBLISHED = {
    ("adult", "one"): 13.12,
    ("dna", "one"): 83.63,
    ("dna", "several"): 79.66,
    ("mushrooms", "one"): 9.68,
}
NEAR = 0.3  # nats that are called a match
GRIDS = {  # what earlier runs, also judged by the validation split only, had left
    "adult": {"weight_decay": (0.0,), "dropout": (0.0,)},
    "dna": {"weight_decay": (0.3,), "dropout": (0.3, 0.5)},
    "mushrooms": {"weight_decay": (0.0, 0.3), "dropout": (0.0,)},
}
SEVERAL = {
    "dna": (
        {"masks": 8, "order": "natural", "connect": "cycle"},
        {"masks": 8, "order": "cycle", "connect": "cycle"},
    )
}
RATE = 1e-3
LOOKAHEAD, PATIENCE, BATCH = 30, 5, 100


def read(folder, name, split):
    """A split of a set, (n, D) float32 of 0 and 1."""
    with np.load(Path(folder) / f"{name}.npz") as z:
        key = split if split in z else f"{split}_reconstructed"
        return torch.from_numpy(np.unpackbits(z[key], axis=1)[:, : int(z[f"{key}_n"])]).float()


def mean_nll(model, x):
    model.eval()
    with torch.no_grad():
        nll = torch.cat([model.nll(part) for part in x.split(2000)]).double().mean().item()
    model.train()
    return nll


def fit(x, valid, seed, epochs, weight_decay, dropout, **options):
    """The best model by the validation split, its NLL there, its epoch, and the epochs that were run."""
    torch.manual_seed(seed)
    noise = torch.Generator().manual_seed(seed)
    model = MADE(x.shape[1], (500,), seed=seed, **options)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=weight_decay)
    halve = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE, threshold=0.0)
    best, at, state, step, epoch = float("inf"), 0, None, 0, 0
    for epoch in range(1, epochs + 1):
        order = torch.from_numpy(permutation(derive(seed, "batches", epoch), len(x)))
        for rows in order.split(BATCH):
            model.select(step)
            step += 1
            seen = target = x[rows]
            if dropout:
                keep = torch.rand(target.shape, generator=noise) >= dropout
                seen = target * keep / (1 - dropout)
            logits = model(seen)
            loss = binary_cross_entropy_with_logits(logits, target, reduction="none").sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        nll = mean_nll(model, valid)
        halve.step(nll)
        if nll < best:
            best, at, state = nll, epoch, copy.deepcopy(model.state_dict())
        if epoch - at >= LOOKAHEAD:
            break
    model.load_state_dict(state)
    return model, best, at, epoch


def line(args, name, masks, choices):
    """Fit every choice, keep the best on the validation split, and open the test split for that one."""
    x, valid = (read(args.data_dir, name, split) for split in ("train", "valid"))
    tried, winner = [], None
    for choice in choices:
        start = time.perf_counter()
        model, nll, at, epochs = fit(x, valid, args.seed, args.epochs, **choice)
        seconds = round(time.perf_counter() - start, 1)
        tried.append({**choice, "valid": round(nll, 4), "at": at, "epochs": epochs, "seconds": seconds})
        print(name, tried[-1], flush=True)
        if winner is None or nll < winner[1]:
            winner = model, nll, tried[-1]
    model, nll, chosen = winner
    test = read(args.data_dir, name, "test")
    at_test, published = mean_nll(model, test), PUBLISHED[name, masks]
    return {
        "set": name,
        "inputs": x.shape[1],
        "sizes": [len(x), len(valid), len(test)],
        "masks": masks,
        "chosen": chosen,
        "mask_id": model.mask_id,
        "valid": round(nll, 4),
        "test": round(at_test, 4),
        "published": published,
        "difference": round(at_test - published, 4),
        "tried": tried,
    }


def grid(**choices):
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def portable(word):
    """A word of the command line without a path of this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of adult.npz, dna.npz and mushrooms.npz")
    parser.add_argument("--sets", default="adult,dna,mushrooms")
    parser.add_argument("--epochs", type=int, default=500, help="at most, for each choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.sets.split(",")) - set(GRIDS):
        parser.error(f"unknown sets {sorted(unknown)}: use some of {','.join(GRIDS)}")
    torch.set_num_threads(1)
    rows = []
    for name in args.sets.split(","):
        rows.append(line(args, name, "one", grid(**GRIDS[name])))
        if name in SEVERAL:
            best = {key: rows[-1]["chosen"][key] for key in GRIDS[name]}
            rows.append(line(args, name, "several", [best | more for more in SEVERAL[name]]))
    command = shlex.join(["python", "benchmarks/continual/made_single.py", *map(portable, sys.argv[1:])])
    args.out.write_text(json.dumps({"command": command, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print("| set | masks | train / valid / test | best epoch | valid NLL | test NLL | published | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes, chosen = " / ".join(map(str, row["sizes"])), row["chosen"]
        print(f"| {row['set']} | {chosen.get('masks', 1)} | {sizes} | {chosen['at']} | {row['valid']:.2f} ", end="")
        print(f"| {row['test']:.2f} | {row['published']} | {row['difference']:+.2f} |")
    for row in rows:
        if row["difference"] > NEAR:
            print(f"MISSED: {row['set']}, {row['masks']} mask(s): more than {NEAR} nats above the published figure")


if __name__ == "__main__":
    main()
