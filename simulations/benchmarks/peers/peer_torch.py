"""The model and the local training that the PyTorch programs of this folder share."""

from __future__ import annotations

from types import MethodType

import torch
from peer import Work
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer


def build(name: str, x: Tensor) -> nn.Module:
    """The CNN of 67 970 parameters, logistic regression on x (clients, examples, features), or what
    ``torch.export`` saved as ``name``: the operations and parameters of Umbel's own model."""
    if name.endswith(".pt2"):
        saved = torch.export.load(name).module(check_guards=False)
        for method in ("train", "eval"):  # which exported models refuse; nothing in them differs
            setattr(saved, method, MethodType(getattr(nn.Module, method), saved))
        return saved
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


def loss(outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy: of labels y (B,), or of the symbol after each of x (B, T), y the last."""
    if outputs.dim() == 2:
        return cross_entropy(outputs, y)
    following = torch.cat([x[:, 1:], y[:, None]], 1)
    return cross_entropy(outputs.flatten(0, 1), following.flatten())


def train(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor, w: Work) -> None:
    """A client's round, in place: x (examples, …), y (examples,)."""
    done = 0
    for _ in range(w.epochs or w.steps or 1):
        for rows in torch.split(torch.randperm(len(y)), w.batch):
            optimizer.zero_grad()
            torch.autograd.backward(loss(model(x[rows]), x[rows], y[rows]))
            optimizer.step()
            done += 1
            if done == w.steps:
                return
