"""The client app of the Flower program; a module of its own, so that Ray's workers import it."""

from __future__ import annotations

import os
from functools import cache

import peer
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peer_torch import build, train
from torch import Tensor, nn

app = ClientApp()


@cache
def held() -> tuple[peer.Work, Tensor, Tensor, nn.Module, torch.optim.Optimizer]:
    """Work, data, model and optimizer: made once a process, which is where tuning begins."""
    w = peer.work(os.environ["BENCH_WORK"])
    if w.options["threads"]:
        torch.set_num_threads(int(w.options["threads"]))
    x, y = (torch.from_numpy(a) for a in peer.arrays(w))
    model = build(w.model, x)
    return w, x, y, model, torch.optim.SGD(model.parameters(), lr=w.lr)


@app.train()
def fit(message: Message, context: Context) -> Message:
    """One round of one client."""
    w, x, y, model, optimizer = held()
    given = message.content["arrays"]
    assert isinstance(given, ArrayRecord)
    model.load_state_dict(given.to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    train(model, optimizer, x[client], y[client], w)
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": w.examples}),
        }
    )
    return Message(content=content, reply_to=message)
