"""Logistic regression; linear regression for real-valued targets."""

from __future__ import annotations

from math import prod

from torch import nn

from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


def logistic(info: Info, outputs: int) -> nn.Module:
    """Logistic regression: one linear layer (linear regression for real-valued targets)."""
    needs(info, "logistic")
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(info.input_shape), outputs))
