"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import nn

from umbel.core.settings import Count, Fraction
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


def mlp(
    info: Info, outputs: int, *, hidden: Sequence[Count] = (64,), dropout: Fraction = 0.0
) -> nn.Module:
    """A fully connected network with ReLU.

    Args:
        info: of the data.
        outputs: width of the last layer.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training.
    """
    needs(info, "mlp")
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise([prod(info.input_shape), *hidden]):
        layers += [nn.Linear(width, following), nn.ReLU()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    last = hidden[-1] if hidden else prod(info.input_shape)
    return nn.Sequential(*layers, nn.Linear(last, outputs))
