"""The convolutional network of the FedAvg paper, and smaller ones of its kind."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


def cnn(
    info: Info,
    outputs: int,
    *,
    channels: Sequence[Count] = (32, 64),
    kernel: Count = 5,
    hidden: Count = 512,
) -> nn.Module:
    """McMahan's CNN: convolutions with ReLU and 2 x 2 max-pooling, one hidden layer.

    The defaults are the paper's: 1,663,370 parameters on MNIST.

    Args:
        info: of the data; ``x`` is an image.
        outputs: width of the last layer.
        channels: of each convolution; every one halves height and width.
        kernel: side of the convolutions, odd; padded to keep height and width.
        hidden: units of the hidden layer.

    Source: McMahan et al. 2017, section 3 (arXiv:1602.05629).
    """
    needs(info, "cnn", images=True)
    depth, height, width = info.input_shape
    layers: list[nn.Module] = []
    for following in channels:
        layers += [nn.Conv2d(depth, following, kernel, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
        depth, height, width = following, height // 2, width // 2
    if not height * width:
        raise ValueError(f"{len(channels)} poolings leave nothing of {info.input_shape}")
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
