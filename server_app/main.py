"""fedmask-flwr: the ServerApp. Everything it does is in ``fedmask_flwr``."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    from fedmask_flwr.flower.apps import serve

    serve(grid, context)
