"""The 2NN of the FedAvg paper."""

from __future__ import annotations

from torch import nn

from umbel.datasets.federated import Info
from umbel.tasks.models.mlp import mlp


def _2nn(info: Info, outputs: int) -> nn.Module:
    """McMahan's 2NN: two hidden layers of 200 ReLU units; 199,210 parameters on MNIST.

    Source: McMahan et al. 2017, section 3 (arXiv:1602.05629).
    """
    return mlp(info, outputs, hidden=(200, 200))
