"""What one layer's input and the gradient of its output say of the gradient of each example.

A layer's per-example gradients are either small enough to be written down, (B, *shape), or known by
two factors whose product they are: then their norms come from the factors' Gram matrices, and their
weighted sum from one product over the whole batch, so that they are never written down.

Source: Goodfellow 2015 (arXiv:1510.01799) for products; Bu, Mao and Xu 2022 (arXiv:2205.10683) for
the choice between the two; Lee and Kifer 2021 (arXiv:2009.03106) for convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GAIN = 16
"""Gradients of p * q numbers are written down where p * q <= GAIN * T * T, for T terms each.

Measured on a CPU, 64 examples, T from 4 to 1024: beyond this the Gram matrices are faster.
"""

HELD = 1 << 22
"""Numbers of one parameter's gradients beyond which they must also take less memory: GAIN is 2."""


class Known(NamedTuple):
    """One parameter's per-example gradients, without saying how they are held.

    Args:
        squares: (examples,), squared L2 norms.
        weighted: factors (groups, B) -> (groups, *shape): of each B consecutive examples, the sum
            of the gradients times their factors. One group: one client's batch.
    """

    squares: Tensor
    weighted: Callable[[Tensor], Tensor]


def written(gradients: Tensor) -> Known:
    """From the gradients themselves, (B, *shape)."""
    flat = gradients.flatten(1)
    squares = torch.linalg.vector_norm(flat, dim=1).square()

    def weighted(factors: Tensor) -> Tensor:
        apart = flat.view(*factors.shape, -1)
        return _batched(factors[:, None], apart).view(len(factors), *gradients.shape[1:])

    return Known(squares, weighted)


def _products(left: Tensor, right: Tensor) -> Known:
    """From factors (B, T, p) and (B, T, q): example b's gradient is left[b].T @ right[b]."""
    terms, rows, columns = left.shape[1], left.shape[2], right.shape[2]

    def weighted(factors: Tensor) -> Tensor:
        groups = len(factors)
        # A convolution's factors lie transposed in memory, which no view can group.
        scaled = (left * factors.reshape(-1, 1, 1)).reshape(groups, -1, rows)
        return _batched(scaled.transpose(1, 2), right.reshape(groups, -1, columns))

    if terms == 1:
        squares = left.square().sum((1, 2)) * right.square().sum((1, 2))
        return Known(squares, weighted)
    gain = GAIN if len(left) * rows * columns <= HELD else 2
    if gain * terms * terms >= rows * columns:
        return written(torch.bmm(left.transpose(1, 2), right))
    gram = torch.bmm(left, left.transpose(1, 2)) * torch.bmm(right, right.transpose(1, 2))
    # A sum of products may come out a hair below 0 where the gradient is 0.
    return Known(gram.sum((1, 2)).clamp(min=0), weighted)


def _batched(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm``, which for a batch of one is slower than the product it is."""
    return (left[0] @ right[0])[None] if len(left) == 1 else torch.bmm(left, right)


def _linear(layer: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Known]:
    x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
    found = {"weight": _products(g, x)}
    if layer.bias is not None:
        found["bias"] = written(g.sum(1))
    return found


def _conv2d(layer: nn.Conv2d, x: Tensor, g: Tensor) -> dict[str, Known]:
    size, out = len(x), layer.out_channels
    patches = _patches(layer, x)
    pixels = g.flatten(2)
    if layer.groups == 1:
        flat = _products(pixels.transpose(1, 2), patches.transpose(1, 2))
        shape = layer.weight.shape
        weight = Known(flat.squares, lambda factors: flat.weighted(factors).view(-1, *shape))
    else:
        apart = pixels.view(size, layer.groups, out // layer.groups, -1)
        own = patches.view(size, layer.groups, -1, patches.shape[-1])
        weight = written((apart @ own.transpose(2, 3)).view(size, *layer.weight.shape))
    found = {"weight": weight}
    if layer.bias is not None:
        found["bias"] = written(pixels.sum(2))
    return found


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(B, channels * kernel, pixels): as ``F.unfold``, in a third of its time, for any padding."""
    x = F.pad(x, layer._reversed_padding_repeated_twice).contiguous()
    size, channels, height, width = x.shape
    (down, across), (rows, columns) = layer.dilation, layer.kernel_size
    high = (height - down * (rows - 1) - 1) // layer.stride[0] + 1
    wide = (width - across * (columns - 1) - 1) // layer.stride[1] + 1
    example, channel, row, column = x.stride()
    between = (layer.stride[0] * row, layer.stride[1] * column)
    windows = x.as_strided(
        (size, channels, rows, columns, high, wide),
        (example, channel, down * row, across * column, *between),
    )
    return windows.reshape(size, channels * rows * columns, high * wide)


def _group_norm(layer: nn.GroupNorm, x: Tensor, g: Tensor) -> dict[str, Known]:
    scaled = F.group_norm(x, layer.num_groups, None, None, layer.eps).mul_(g)
    return {"weight": written(_over_pixels(scaled)), "bias": written(_over_pixels(g))}


def _over_pixels(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(2).sum(2)


def _layer_norm(layer: nn.LayerNorm, x: Tensor, g: Tensor) -> dict[str, Known]:
    scaled = F.layer_norm(x, layer.normalized_shape, None, None, layer.eps).mul_(g)
    between = list(range(1, x.dim() - len(layer.normalized_shape)))
    found = {"weight": written(scaled.sum(between) if between else scaled)}
    if layer.bias is not None:
        found["bias"] = written(g.sum(between) if between else g)
    return found


def _embedding(layer: nn.Embedding, x: Tensor, g: Tensor) -> dict[str, Known]:
    tokens, g = x.reshape(len(x), -1), g.reshape(len(x), -1, g.shape[-1])
    if layer.padding_idx is not None:
        g = g * (tokens != layer.padding_idx)[..., None]
    same = tokens[:, :, None] == tokens[:, None, :]
    squares = (torch.bmm(g, g.transpose(1, 2)) * same).sum((1, 2)).clamp(min=0)

    def weighted(factors: Tensor) -> Tensor:
        rows = (g * factors.reshape(-1, 1, 1)).flatten(0, 1)
        groups, (symbols, width) = len(factors), layer.weight.shape
        table = g.new_zeros(groups * symbols, width)
        first = torch.arange(groups, device=tokens.device) * symbols
        at = tokens.view(groups, -1) + first[:, None]
        return table.index_add_(0, at.flatten(), rows).view(groups, symbols, width)

    return {"weight": Known(squares, weighted)}


RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], dict[str, Known]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
"""(layer, its input (B, …), gradient of the loss by its output) -> parameter -> gradients."""
