"""What a way to learn without labels consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from umbel.core.errors import InputError
from umbel.tasks.models.vit import ViT
from umbel.tasks.task import Batch, Forward

View: TypeAlias = Callable[[Tensor], Tensor]
"""A random view of each example, (B, …) -> (B, …)."""


class Method(NamedTuple):
    """One way to learn without labels.

    Args:
        around: encoder -> the module that is trained. Given examples, it gives embeddings, (B, …)
            -> (B, at least ``embedding``), those first.
        losses: (module, examples (B, …), view) -> (B,).
        decomposable: whether each loss is a function of its own example alone.
        follows: whether the module has slow copies (:class:`~networks.Slow`).
        pictures: (module, examples) -> (rows, B, C, H, W): what can be seen of it.
    """

    around: Callable[[nn.Module], nn.Module]
    losses: Callable[[Forward, Tensor, View], Tensor]
    decomposable: bool
    follows: bool = False
    pictures: Callable[[Forward, Batch], Tensor] | None = None


def two_views(forward: Forward, x: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """What the module gives for two views of each example, (B, columns) each, in one pass."""
    first, second = forward(torch.cat([view(x), view(x)])).chunk(2)
    return first, second


def patched(encoder: nn.Module, method: str) -> ViT:
    """``encoder``, which has patches.

    Raises:
        InputError: it is not a ``vit`` without a last layer.
    """
    if isinstance(encoder, ViT):
        return encoder
    raise InputError(
        f"method '{method}' hides patches, and {type(encoder).__name__} has none",
        where="[task] model",
        fix='set model = "vit"',
    )
