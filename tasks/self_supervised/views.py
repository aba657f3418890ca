"""Random views of examples, drawn on their device from torch's generator, all at once.

The runtime seeds that generator by run, round and client, so a step's views repeat with the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Views(NamedTuple):
    """How much one view of an example differs from another.

    Args:
        crop: least side of a crop, as a share of the image's.
        rotate: greatest angle either way, in radians.
        flip: whether half of the images are mirrored.
        jitter: contrast is multiplied by 1 ± this, and the mean moved by ± this.
        noise: standard deviation of what is added to each number.
        drop: share of the numbers of an example that is no image that are set to 0.
    """

    crop: float = 0.7
    rotate: float = 0.2
    flip: bool = False
    jitter: float = 0.3
    noise: float = 0.1
    drop: float = 0.2

    def __call__(self, x: Tensor) -> Tensor:
        """One view of each example, (B, …) -> (B, …); images are (B, channels, height, width)."""
        x = self._image(x) if x.dim() == 4 else x * (torch.rand_like(x) >= self.drop)
        return x + self.noise * torch.randn_like(x)

    def _image(self, x: Tensor) -> Tensor:
        def uniform() -> Tensor:
            return 2 * torch.rand(len(x), device=x.device, dtype=x.dtype) - 1

        side = 1 - (1 - self.crop) * uniform().abs()
        angle = self.rotate * uniform()
        mirror = torch.where(uniform() < 0, -1.0, 1.0).to(x) if self.flip else torch.ones_like(side)
        cos, sin = side * angle.cos(), side * angle.sin()
        # The crop lies anywhere inside the image.
        across, down = (1 - side) * uniform(), (1 - side) * uniform()
        rows = [
            torch.stack([mirror * cos, -sin, across], 1),
            torch.stack([mirror * sin, cos, down], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        mean = x.mean((1, 2, 3), keepdim=True)
        contrast, shift = (1 + self.jitter * uniform()), self.jitter * uniform()
        return (x - mean) * contrast[:, None, None, None] + mean + shift[:, None, None, None]
