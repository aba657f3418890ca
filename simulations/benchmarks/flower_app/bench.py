"""A Flower app in one file: a small CNN or a logistic regression on random images.

Tuned as its author can: a process keeps the model and the optimizer from message to message, and
examples are drawn and not read. After each round the server prints ``round N TIME``, the wall
clock's.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn.functional import cross_entropy

server = ServerApp()
client = ClientApp()


def model(name: str) -> nn.Module:
    """The CNN of 67 970 parameters, or the logistic regression of 650."""
    if name == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 40),
        nn.ReLU(),
        nn.Linear(40, 10),
    )


@cache
def held(name: str, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What a process keeps."""
    net = model(name)
    return net, torch.optim.SGD(net.parameters(), lr=lr)


@client.train()
def train(message: Message, context: Context) -> Message:
    """One epoch, or fewer steps, of SGD on this node's examples."""
    config, node = context.run_config, int(context.node_config["partition-id"])
    arrays = message.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    net, optimizer = held(str(config["model"]), float(config["learning-rate"]))
    net.load_state_dict(arrays.to_torch_state_dict())
    size, examples = (8 if config["model"] == "logistic" else 28), int(config["examples"])
    drawn = torch.Generator().manual_seed(node)
    x = torch.randn(examples, 1, size, size, generator=drawn)
    y = torch.randint(10, (examples,), generator=drawn)
    batches = torch.split(torch.randperm(examples), int(config["batch-size"]))
    for rows in batches[: int(config["steps"])]:
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(net(x[rows]), y[rows]))
        optimizer.step()
    metrics = MetricRecord({"num-examples": examples})
    content = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg over a share of the nodes, without evaluation."""
    config = context.run_config

    def ended(number: int, arrays: ArrayRecord) -> None:
        print(f"round {number} {time.time():.6f}", flush=True)

    strategy = FedAvg(fraction_train=float(config["fraction-train"]), fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model(str(config["model"])).state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=ended,
    )
