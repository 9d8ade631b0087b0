"""Flower's own FedAvg: the ServerApp; a line a round, as the bundled app writes it."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federate with ``flwr.serverapp.strategy.FedAvg`` and evaluate on the server after every round."""
    import json
    import time
    from pathlib import Path

    import torch
    from flwr.serverapp.strategy import FedAvg

    from client_app import task

    config = context.run_config
    torch.set_num_threads(1)
    torch.manual_seed(7)
    model = task.build()
    x, y = map(torch.from_numpy, task.mnist(config["data-dir"], "test"))
    strategy = FedAvg(fraction_train=config["fraction-train"], fraction_evaluate=0.0)
    began = [time.monotonic()]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        found = task.accuracy(model, x, y)
        now = time.monotonic()
        if server_round:
            sent = sum(len(array.data) for array in arrays.values()) * round(
                config["fraction-train"] * len(list(grid.get_node_ids()))
            )
            line = {"round": server_round, "accuracy_threshold": found, "seconds": round(now - began[0], 3)}
            line |= {"uplink_bytes": sent, "downlink_bytes": sent, "clients_failed": 0}
            with (Path(config["out"]) / "metrics.jsonl").open("a") as f:
                f.write(json.dumps(line) + "\n")
        began[0] = time.monotonic()
        return MetricRecord({"accuracy": found})

    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
