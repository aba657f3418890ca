"""The clients: what Flower's template makes, nothing of Umbel."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn.functional import cross_entropy

from flower_app.task import load, model

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the model on this client's examples."""
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    place, places = context.node_config["partition-id"], context.node_config["num-partitions"]
    x, y, _, _ = load(int(place), int(places))
    optimizer = torch.optim.SGD(net.parameters(), lr=float(context.run_config["learning-rate"]))
    for _ in range(int(context.run_config["local-epochs"])):
        for batch in torch.randperm(len(y)).split(32):
            optimizer.zero_grad()
            loss = cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            "metrics": MetricRecord({"num-examples": len(y), "train-loss": loss.item()}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluates the model on this client's test examples."""
    net = model()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    place, places = context.node_config["partition-id"], context.node_config["num-partitions"]
    _, _, x, y = load(int(place), int(places))
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == y).float().mean().item()
    metrics = MetricRecord({"num-examples": len(y), "accuracy": accuracy})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
