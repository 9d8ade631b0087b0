"""digits: the ClientApp."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import Net, load_data, train

app = ClientApp()


@app.train()
def train_fn(msg: Message, context: Context) -> Message:
    """Train on this client's digits."""
    loader, _ = load_data(context.node_config["partition-id"], context.node_config["num-partitions"])
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = train(model, optimizer, loader, context.run_config["local-epochs"])
    metrics = {"num-examples": len(loader.dataset), "train_loss": loss}
    return Message(
        RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}),
        reply_to=msg,
    )
