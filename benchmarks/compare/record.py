"""Keep comparisons in git, and draw the README's picture from them.

    python benchmarks/compare/prepare.py --data ../shared/data --out /tmp/prepared
    fedmask compare ... --data npz --data-dir /tmp/prepared/hapt --out runs/hapt      # see README.md here
    python benchmarks/compare/record.py hapt=runs/hapt mnist=runs/mnist cifar10=runs/cifar10
    python benchmarks/compare/record.py                                               # picture and tables again

<name>.json holds the settings and the metrics of every round of every complete run, <name>.md the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fedmask_flwr import track
from fedmask_flwr.compare.plot import curves
from fedmask_flwr.compare.report import markdown, summarise
from fedmask_flwr.compare.results import FIGURES, Result, read, shared

HERE = Path(__file__).parent
PICTURE = HERE.parents[1] / "docs/accuracy-vs-bytes.png"
KEPT = ("round", "clients_ok", *FIGURES)
PANELS = {  # name: title, metric, what it is
    "hapt": ("HAPT, 30 real users", "client_accuracy_mean", "accuracy on a user's own test data (mean)"),
    "mnist": ("MNIST, Dirichlet(0.5), 10 clients", "client_accuracy_mean", "on clients' own test data (mean)"),
    "cifar10": (
        "CIFAR-10 (JPEG q75), Dirichlet(0.5), 10",
        "client_accuracy_mean",
        "on clients' own test data (mean)",
    ),
}


def keep(name, folder):
    """Write <name>.json from a comparison's folder; paths stay out of it."""
    results = [result for result in read(folder) if result.complete]
    config = {k: v for k, v in shared(results).items() if k not in track.WHERE_NOT_WHAT}
    runs = [
        {
            "label": r.label,
            "method": r.method,
            "settings": r.settings,
            "seed": r.seed,
            "rows": [{k: round(row[k], 5) for k in KEPT if row.get(k) is not None} for row in r.rows],
        }
        for r in results
    ]
    lines = [json.dumps(run, sort_keys=True) for run in runs]
    text = f'{{"config": {json.dumps(config, sort_keys=True)},\n"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    (HERE / f"{name}.json").write_text(text)


def kept(name):
    """The settings, and the complete runs that were kept."""
    record = json.loads((HERE / f"{name}.json").read_text())
    return record["config"], [
        Result(r["label"], r["method"], r["settings"], r["seed"], "", "", complete=True, config={}, rows=r["rows"])
        for r in record["runs"]
    ]


def draw(found):
    labels = list(dict.fromkeys(r.label for results in found.values() for r in results))
    hues = colormaps["tab20"]
    figure = Figure(figsize=(4.6 * len(found) + 2.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    lines = {}
    for axes, (name, results) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        title, metric, words = PANELS[name]
        for label, curve in curves(results, metric).items():
            sent, mean, low, high = curve.T
            style = {"color": hues(labels.index(label) % 20)}
            (lines[label],) = axes.plot(sent / 1e6, mean, marker=".", **style)
            axes.fill_between(sent / 1e6, low, high, alpha=0.15, linewidth=0, **style)
        axes.set(xscale="log", xlabel="sent so far, up and down, all clients (MB)", ylabel=words, title=title)
        axes.grid(visible=True, alpha=0.3)
    order = [label for label in labels if label in lines]
    names = [label.partition("(")[0] for label in order]
    figure.legend([lines[n] for n in order], names, loc="outside right upper", fontsize="small", frameon=False)
    figure.savefig(PICTURE, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="name=folder of a comparison")
    for pair in parser.parse_args().runs:
        name, _, folder = pair.partition("=")
        keep(name, Path(folder))
    found = {name: kept(name) for name in PANELS if (HERE / f"{name}.json").exists()}
    for name, (config, results) in found.items():
        table = markdown(config, summarise(results))
        (HERE / f"{name}.md").write_text(table)
        print(f"{name}\n{table}")
    draw({name: results for name, (_, results) in found.items()})


if __name__ == "__main__":
    main()
