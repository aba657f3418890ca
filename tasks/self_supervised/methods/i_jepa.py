"""I-JEPA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from umbel.core.errors import InputError
from umbel.core.settings import Count, Fraction, Share
from umbel.tasks.models.gpt import Block
from umbel.tasks.models.vit import ViT, places
from umbel.tasks.self_supervised.method import Method, View, patched
from umbel.tasks.self_supervised.networks import Slow
from umbel.tasks.task import Forward


def i_jepa(
    encoder: nn.Module,
    *,
    blocks: Count = 2,
    side: Share = 0.4,
    momentum: Fraction = 0.99,
    predictor: Count = 32,
) -> Method:
    """I-JEPA: predict what a slow copy makes of the hidden blocks of an image, not their numbers.

    Blocks are squares of patches, at random places; all others are seen, and one predictor tells
    all that is hidden at once. Targets are normalised, patch by patch.

    Args:
        encoder: a ``vit``.
        blocks: that are hidden; they may overlap.
        side: of a block, as a share of the image's smaller side.
        momentum: of the slow copy, which begins each round as the global network.
        predictor: width of the predictor's one block; a multiple of 4.

    Source: Assran et al. 2023, section 3 (arXiv:2301.08243).
    """
    high, wide = patched(encoder, "i-jepa").grid
    edge = max(1, round(side * min(high, wide)))
    if blocks * edge * edge >= high * wide:
        raise InputError(
            f"{blocks} blocks of {edge} × {edge} may hide all {high} × {wide} patches",
            where="[task] method",
            fix="choose fewer blocks, a smaller side, or smaller patches",
        )

    def around(encoder: nn.Module) -> nn.Module:
        return Predicting(patched(encoder, "i-jepa"), predictor, momentum)

    def losses(forward: Forward, x: Tensor, view: View) -> Tensor:
        shown = ~_blocks(len(x), blocks, (high, wide), edge, x.device)
        guess, target = forward(x, shown).chunk(2, 2)
        error = F.smooth_l1_loss(guess, target.detach(), reduction="none").mean(2)
        found: Tensor = (error * ~shown).sum(1) / (~shown).sum(1)
        return found

    return Method(around, losses, decomposable=True, follows=True)


def _blocks(
    batch: int, count: int, grid: tuple[int, int], edge: int, device: torch.device
) -> Tensor:
    """Which patches lie in a block, (batch, patches) bool."""

    def inside(sides: int) -> Tensor:
        at = (torch.rand(batch, count, 1, device=device) * (sides - edge + 1)).floor()
        place = torch.arange(sides, device=device)
        return (place >= at) & (place < at + edge)

    rows, columns = inside(grid[0]), inside(grid[1])
    return (rows[:, :, :, None] & columns[:, :, None, :]).any(1).flatten(1)


class Predicting(nn.Module):
    """A ``vit``, its slow copy, and a block that predicts what the copy gives."""

    places: Tensor

    def __init__(self, encoder: ViT, width: int, momentum: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.target = Slow(encoder, momentum)
        self.enter = nn.Linear(encoder.width, width)
        self.hidden = nn.Parameter(0.02 * torch.randn(width))
        self.block = Block(width, 4, 0.0, False)
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, encoder.width)
        self.register_buffer("places", places(encoder.grid, width), persistent=False)

    def forward(self, x: Tensor, shown: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, embedding); with ``shown`` (B, patches), prediction and target of
        each patch side by side, (B, patches, 2 · width)."""
        if shown is None:
            h: Tensor = self.encoder(x)
            return h
        seen = self.enter(self.encoder.tokens(x, shown))
        t = torch.where(shown[:, :, None], seen, self.hidden) + self.places
        guess = self.leave(self.norm(self.block(t)))
        with torch.no_grad():
            whole = patched(self.target.network(), "i-jepa").tokens(x)
            target = F.layer_norm(whole, whole.shape[2:])
        return torch.cat([guess, target], 2)
