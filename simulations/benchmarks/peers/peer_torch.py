"""The model and the local training that the PyTorch programs of this folder share."""

from __future__ import annotations

import torch
from peer import Work
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer


def build(name: str, x: Tensor) -> nn.Module:
    """The CNN of 67 970 parameters, or logistic regression on x (clients, examples, features)."""
    if name == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(x.shape[-1], 10))
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


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, w: Work) -> None:
    """A client's round, in place: x (examples, …), y (examples,)."""
    done = 0
    for _ in range(w.epochs or w.steps or 1):
        for rows in torch.split(torch.randperm(len(y)), w.batch):
            optimizer.zero_grad()
            torch.autograd.backward(cross_entropy(model(x[rows]), y[rows]))
            optimizer.step()
            done += 1
            if done == w.steps:
                return
