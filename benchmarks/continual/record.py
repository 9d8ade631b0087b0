"""Keep what continual comparisons came to: one JSON a folder, and the tables of README.md beside this file.

    python benchmarks/continual/record.py NAME=runs/folder ...

A folder is of a comparison or a single run. Figures are of the last evaluation, means over clients; a cell is the
mean over seeds and the range.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedmask_flwr.compare.results import INDEX, read
from fedmask_flwr.continual.figures import forgetting
from fedmask_flwr.track import CONFIG, METRICS, read_lines

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
FIGURES = ("loss_new", "loss_base", "loss", "loss_mixture", "loss_latest", "accuracy", "accuracy_new", "task_found")
NOT_WHAT = ("out", "data-dir", "memory-dir", "compare", "seeds", "clients", "node-timeout", "round-timeout")


def figures(rows):
    """One run: its last evaluation, what it forgot, what it sent (MB, all clients, all rounds)."""
    judged = [row for row in rows if "client_loss" in row]
    found = {name: judged[-1][f"client_{name}"] for name in FIGURES if f"client_{name}" in judged[-1]}
    if "client_loss_base" in judged[0]:
        found["loss_base_first"] = judged[0]["client_loss_base"]
    found |= {f"forgetting_{kind}": value for kind, value in forgetting(judged).items()}
    found["up_mb"] = sum(row["uplink_bytes"] for row in rows) / 1e6
    found["down_mb"] = sum(row["downlink_bytes"] for row in rows) / 1e6
    found["clients_failed"] = sum(row["clients_failed"] for row in rows)
    return found


def runs(folder):
    """(label, seed, config, rows) of every complete run."""
    if (folder / INDEX).exists():
        return [(r.label, r.seed, r.config, r.rows) for r in read(folder) if r.complete]
    config = json.loads((folder / CONFIG).read_text())
    return [(config["method"], config["seed"], config, read_lines(folder / METRICS))]


def record(name, folder):
    """Write one folder's JSON; return its table."""
    found, config = {}, {}
    for label, seed, told, rows in runs(folder):
        found.setdefault(label, {})[seed] = figures(rows)
        config = {k: v for k, v in told.items() if k not in (*NOT_WHAT, "method", "seed")}
    config["scenario"] = Path(config["scenario"]).name  # a table's folder is this machine's
    kept = {"settings": config, "runs": found, "attention": last_attention(folder)}
    (RESULTS / f"continual-{name}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    columns = [c for c in next(iter(next(iter(found.values())).values())) if c != "clients_failed"]
    lines = ["| method | " + " | ".join(columns) + " | seeds |", "|---" * (len(columns) + 2) + "|"]
    for label, seeds in found.items():
        cells = [cell([run[c] for run in seeds.values() if c in run]) for c in columns]
        lines.append(f"| `{label}` | {' | '.join(cells)} | {', '.join(map(str, seeds))} |")
    return "\n".join(lines)


def cell(values):
    """Mean, and the range where there are several."""
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def last_attention(folder):
    """Rows [client, task, owner, its task, alpha] of a single run's last round."""
    return [] if (folder / INDEX).exists() else read_lines(folder / METRICS)[-1].get("attention", [])


def main():
    for pair in sys.argv[1:]:
        name, _, folder = pair.partition("=")
        print(f"## {name}\n\n{record(name, Path(folder))}\n")


if __name__ == "__main__":
    main()
