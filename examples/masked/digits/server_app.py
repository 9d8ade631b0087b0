"""digits: the ServerApp."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from digits.task import Net, load_data, test
from fedmask_flwr import MaskStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Federate, and evaluate on the server after every round."""
    model = Net()
    _, loader = load_data(0, 1)
    strategy = MaskStrategy("deltamask", model)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        strategy.load(model, arrays)
        return MetricRecord({"accuracy": test(model, loader)})

    strategy.start(
        grid=grid,
        initial_arrays=strategy.initial_arrays(),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=evaluate,
    )
