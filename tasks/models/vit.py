"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.settings import Count, Fraction
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs
from umbel.tasks.models.gpt import Block


class ViT(nn.Module):
    """Patches, fixed places, blocks, a LayerNorm, and a linear head on the mean of the patches."""

    places: Tensor

    def __init__(
        self,
        info: Info,
        outputs: int | None,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        depth, *sides = info.input_shape
        self.grid = (sides[0] // patch, sides[1] // patch)
        self.patch, self.width = patch, width
        self.numbers = depth * patch * patch
        self.embed = nn.Linear(self.numbers, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Identity() if outputs is None else nn.Linear(width, outputs)
        self.register_buffer("places", places(self.grid, width), persistent=False)

    def tokens(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W) -> (B, patches, width).

        Nothing attends to a patch that is not ``visible`` (B, patches); what is given for it means
        nothing.
        """
        t = self.embed(patches(x, self.patch)) + self.places
        mask = None
        if visible is not None:
            mask = torch.where(visible[:, None, None, :], 0.0, -1e9).to(t.dtype)
            mask = mask.expand(-1, 1, t.shape[1], -1)
        for block in self.blocks:
            t = block(t, mask)
        out: Tensor = self.norm(t)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, outputs), or the mean token (B, width)."""
        out: Tensor = self.head(self.tokens(x).mean(1))
        return out


def patches(x: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, patches, C · side · side), row by row of the image."""
    return F.unfold(x, side, stride=side).transpose(1, 2)


def image(found: Tensor, shape: tuple[int, ...], side: int) -> Tensor:
    """The inverse of :func:`patches`; ``shape`` is (C, H, W)."""
    return F.fold(found.transpose(1, 2), shape[1:], side, stride=side)


def places(grid: tuple[int, int], width: int) -> Tensor:
    """Sines and cosines of each patch's row and column, (patches, width).

    Source: Vaswani et al. 2017, section 3.5 (arXiv:1706.03762), half of the numbers for each axis.
    """
    rates = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    rows, columns = (torch.arange(n)[:, None] * rates for n in grid)
    down = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, grid[1], -1)
    across = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(grid[0], -1, -1)
    return torch.cat([down, across], 2).reshape(grid[0] * grid[1], width)


def vit(
    info: Info,
    outputs: int,
    head: str = "class",
    *,
    patch: Count = 4,
    layers: Count = 2,
    width: Count = 64,
    heads: Count = 4,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """A small vision transformer: what ``mae`` and ``i-jepa`` train; classifies, too.

    Args:
        info: of the data; ``x`` is an image whose sides are multiples of ``patch``.
        outputs: width of the last layer, where there is one.
        head: ``features`` for none: the mean of the patches' ``width`` numbers.
        patch: side of a patch.
        layers: blocks.
        width: dimensions; a multiple of ``heads`` and of 4.
        heads: of the attention.
        dropout: share dropped after attention and feed-forward layers in training.

    Source: Dosovitskiy et al. 2021, section 3.1 (arXiv:2010.11929), with the mean in place of a
    class token, as in He et al. 2022, appendix A.1 (arXiv:2111.06377).
    """
    needs(info, "vit", images=True)
    if width % heads or width % 4:
        raise ValueError(f"width {width} is no multiple of heads = {heads} and of 4")
    if any(side % patch for side in info.input_shape[1:]):
        raise ValueError(f"images of {info.input_shape[1:]} are no whole patches of {patch}")
    outs = None if head == "features" else outputs
    return ViT(info, outs, patch, layers, width, heads, dropout)
