"""MAE, the masked auto-encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from umbel.core.settings import Count, Fraction
from umbel.tasks.models.gpt import Block
from umbel.tasks.models.vit import ViT, image, patches, places
from umbel.tasks.self_supervised.method import Method, View, patched
from umbel.tasks.task import Batch, Forward


def mae(encoder: nn.Module, *, masked: Fraction = 0.75, decoder: Count = 32) -> Method:
    """MAE: paint the hidden patches of an image, from those that are seen.

    No views are drawn: what is hidden is view enough. The loss is the squared error over the hidden
    patches, of the numbers as they are.

    Args:
        encoder: a ``vit``.
        masked: share of the patches that are hidden.
        decoder: width of the decoder's one block; a multiple of 4.

    Source: He et al. 2022, section 3 (arXiv:2111.06377).
    """
    like = patched(encoder, "mae")
    count = like.grid[0] * like.grid[1]
    shown = max(1, round((1 - masked) * count))

    def around(encoder: nn.Module) -> nn.Module:
        return Masked(patched(encoder, "mae"), decoder)

    def choose(x: Tensor) -> Tensor:
        order = torch.rand(len(x), count, device=x.device).argsort(1).argsort(1)
        return order < shown

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        visible = choose(x)
        error = (forward(x, visible) - patches(x, like.patch)).square().mean(2)
        found: Tensor = (error * ~visible).sum(1) / max(count - shown, 1)
        return found

    def pictures(forward: Forward, batch: Batch) -> Tensor:
        x = batch["x"]
        visible = choose(x)[:, :, None]
        given = patches(x, like.patch)
        rows = [given, given * visible, torch.where(visible, given, forward(x, visible[..., 0]))]
        return torch.stack([image(row, tuple(x.shape[1:]), like.patch) for row in rows])

    return Method(around, losses, decomposable=True, pictures=pictures)


class Masked(nn.Module):
    """A ``vit``, and a block that paints what it did not see."""

    places: Tensor

    def __init__(self, encoder: ViT, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.enter = nn.Linear(encoder.width, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.block = Block(width, 4, 0.0, False)
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, encoder.numbers)
        self.register_buffer("places", places(encoder.grid, width), persistent=False)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, embedding); with ``visible`` (B, patches), what is painted of each
        patch, (B, patches, numbers)."""
        if visible is None:
            h: Tensor = self.encoder(x)
            return h
        seen = self.enter(self.encoder.tokens(x, visible))
        t = torch.where(visible[:, :, None], seen, self.hidden) + self.places
        out: Tensor = self.paint(self.norm(self.block(t)))
        return out
