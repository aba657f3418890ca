"""A small residual network without batch statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.settings import Count
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2, arXiv:1512.03385)."""

    def __init__(self, depth: int, following: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(depth, following, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, following)
        self.conv2 = nn.Conv2d(following, following, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, following)
        same = stride == 1 and depth == following
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(depth, following, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, depth, H, W) -> (B, following, H / stride, W / stride)."""
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class Mean(nn.Module):
    """Global average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C)."""
        return x.mean((-2, -1))


def resnet(
    info: Info,
    outputs: int,
    *,
    channels: Sequence[Count] = (16, 32, 64),
    blocks: Count = 1,
    groups: Count = 4,
) -> nn.Module:
    """A small ResNet with GroupNorm, which holds no statistics of anybody's data.

    Args:
        info: of the data; ``x`` is an image.
        outputs: width of the last layer.
        channels: of each stage; every stage after the first halves height and width.
        blocks: residual blocks a stage.
        groups: of each GroupNorm; divides every number of channels.

    Source: He et al. 2016, section 4.2 (arXiv:1512.03385); GroupNorm in place of BatchNorm as in
    Hsieh et al. 2020 (arXiv:1910.00189).
    """
    needs(info, "resnet", images=True)
    first = channels[0]
    layers: list[nn.Module] = [
        nn.Conv2d(info.input_shape[0], first, 3, padding=1, bias=False),
        nn.GroupNorm(groups, first),
        nn.ReLU(),
    ]
    layers += [Block(first, first, 1, groups) for _ in range(blocks)]
    for depth, following in pairwise(channels):
        layers.append(Block(depth, following, 2, groups))
        layers += [Block(following, following, 1, groups) for _ in range(blocks - 1)]
    return nn.Sequential(*layers, Mean(), nn.Linear(channels[-1], outputs))
