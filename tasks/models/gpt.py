"""A small transformer that needs nothing but torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from umbel.core.settings import Count, Fraction
from umbel.datasets.federated import Info
from umbel.tasks.models.build import needs


class Block(nn.Module):
    """Attention and a feed-forward layer, each after a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, width) -> the same shape; ``mask`` (B, 1, T, T) is added to the scores."""
        batch, length, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        x = x + self.drop(self.out(seen.transpose(1, 2).reshape(batch, length, width)))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class GPT(nn.Module):
    """Embeddings, blocks, a LayerNorm and a linear head."""

    def __init__(
        self,
        symbols: int,
        outputs: int,
        head: str,
        layers: int,
        width: int,
        heads: int,
        context: int,
        dropout: float,
        padding: int | None,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(symbols, width)
        self.places = nn.Embedding(context, width)
        causal = head == "causal"
        self.blocks = nn.ModuleList(Block(width, heads, dropout, causal) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs, bias=head == "class")
        self.kind = head
        # At the end of a record, where padding stands, nothing that comes before sees it.
        self._padding = None if causal else padding
        self._checkpointing = checkpointing

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 symbols -> (B, T, outputs), or (B, outputs) for an output an example."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        mask, inside = None, None
        if self._padding is not None:
            inside = tokens != self._padding
            mask = torch.where(inside[:, None, None, :], 0.0, -1e9).to(x.dtype)
            mask = mask.expand(-1, 1, tokens.shape[1], -1)
        for block in self.blocks:
            if self._checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        x = self.norm(x)
        if self.kind == "class" and inside is None:
            x = x.mean(1)
        elif inside is not None and self.kind == "class":
            share = inside.to(x.dtype)
            x = (x * share[:, :, None]).sum(1) / share.sum(1, keepdim=True).clamp(min=1)
        out: Tensor = self.head(x)
        return out


def gpt(
    info: Info,
    outputs: int,
    head: str,
    *,
    layers: Count = 4,
    width: Count = 128,
    heads: Count = 4,
    context: Count | None = None,
    dropout: Fraction = 0.0,
    checkpointing: bool = False,
) -> nn.Module:
    """A small GPT: reads symbols, predicts the next, or hidden ones, or a class.

    Blocks with LayerNorm first and learned places, initialised as torch's layers are, which at this
    size learns faster than GPT-2's own start. Where symbols may see those after them, as for masked
    ones and for classes, it is a small BERT.

    Args:
        info: of the data; ``x`` is symbols.
        outputs: symbols or classes to choose from.
        head: ``causal``, ``masked`` or ``class``.
        layers: blocks.
        width: dimensions; a multiple of ``heads``.
        heads: of the attention.
        context: the longest record; ``None``: as long as those of the data.
        dropout: share dropped after attention and feed-forward layers in training.
        checkpointing: whether blocks are computed again in the backward pass, which keeps one
            block's activations in memory and not all.

    Source: Radford et al. 2019, section 2.3 (GPT-2).
    """
    needs(info, "gpt", symbols=True)
    assert info.vocabulary is not None
    length = info.input_shape[0]
    if width % heads:
        raise ValueError(f"width {width} is no multiple of heads = {heads}")
    if context is not None and context < length:
        raise ValueError(f"context = {context} is less than the {length} symbols of a record")
    sizes: dict[str, Any] = {"layers": layers, "width": width, "heads": heads}
    return GPT(
        info.vocabulary,
        outputs,
        head,
        context=context or length,
        dropout=dropout,
        padding=info.padding,
        checkpointing=checkpointing,
        **sizes,
    )
