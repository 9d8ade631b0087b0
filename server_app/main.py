"""fedmask-flwr: the ServerApp. Everything it does is in ``fedmask_flwr``."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation, or the comparison of several, that the run config describes."""
    from fedmask_flwr.flower.apps import serve
    from fedmask_flwr.flower.compare import compare

    run = compare if context.run_config.get("compare") else serve
    run(grid, context)
