"""The four-block convolutional network of few-shot learning."""

from __future__ import annotations

from typing import Literal

from torch import nn

from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


def conv4(
    info: Info,
    outputs: int,
    head: str = "class",
    *,
    channels: Count = 64,
    norm: Literal["batch", "group"] = "batch",
) -> nn.Module:
    """Four blocks of 3 x 3 convolution, normalisation, ReLU and 2 x 2 max-pooling.

    28 x 28 images give ``channels`` features. As an embedding it has no layer after them.

    Args:
        info: of the data; ``x`` is an image of at least 16 x 16.
        outputs: width of the last layer, where there is one.
        head: ``features`` for none.
        channels: of every block.
        norm: ``batch`` uses the statistics of each batch, in evaluation too, and keeps none, as
            is usual for episodes; ``group`` has eight groups and sees each example alone.

    Source: Vinyals et al. 2016, section 4.1.1 (arXiv:1606.04080).
    """
    needs(info, "conv4", images=True)
    depth, height, width = info.input_shape
    layers: list[nn.Module] = []
    for _ in range(4):
        normal = (
            nn.BatchNorm2d(channels, track_running_stats=False)
            if norm == "batch"
            else nn.GroupNorm(min(8, channels), channels)
        )
        layers += [nn.Conv2d(depth, channels, 3, padding=1), normal, nn.ReLU(), nn.MaxPool2d(2)]
        depth, height, width = channels, height // 2, width // 2
    if not height * width:
        raise ValueError(f"four poolings leave nothing of {info.input_shape}")
    layers.append(nn.Flatten())
    if head != "features":
        layers.append(nn.Linear(channels * height * width, outputs))
    return nn.Sequential(*layers)
