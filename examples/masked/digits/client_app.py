"""digits: the ClientApp."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from digits.task import Net, load_data, train
from fedmask_flwr import MaskTurn

app = ClientApp()


@app.train()
def train_fn(msg: Message, context: Context) -> Message:
    """Train on this client's digits."""
    loader, _ = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    model = Net()
    turn = MaskTurn(msg, context, model)
    optimizer = turn.optimizer(lr=0.1)
    loss = train(model, optimizer, loader, context.run_config["local-epochs"])
    return turn.reply(num_examples=len(loader.dataset), metrics={"train_loss": loss})
