"""fedmask-flwr: the ClientApp. Everything it does is in ``fedmask_flwr``."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

# Through the package: Flower's simulation loads both apps in threads, and two that take the import locks of package
# and module in opposite orders deadlock.
from fedmask_flwr.flower import identify, safely

app = ClientApp()


@app.train()
@safely
def train(msg: Message, context: Context) -> Message:
    """Train a mask on this device's data."""
    from fedmask_flwr.flower.apps import train_turn

    return train_turn(msg, context)


@app.evaluate()
@safely
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the broadcast network on this device's data."""
    from fedmask_flwr.flower.apps import evaluate_turn

    return evaluate_turn(msg, context)


@app.query()
@safely
def query(msg: Message, context: Context) -> Message:
    """Tell the client's stable number."""
    return identify(msg, context)
