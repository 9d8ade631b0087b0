"""Flower's own FedAvg: the ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train on this client's images."""
    import torch

    from client_app import task

    torch.set_num_threads(1)
    x, y = task.examples(
        context.run_config["data-dir"], context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    model = task.build()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loss = task.train(model, x, y, context.run_config["local-epochs"])
    metrics = MetricRecord({"num-examples": len(y), "train_loss": loss})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=msg)
