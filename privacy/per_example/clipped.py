"""What every way to compute per-example gradients is given, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from umbel.core.trees import Tree

Forward: TypeAlias = Callable[..., Tensor]
Batch: TypeAlias = Mapping[str, Tensor]

Losses: TypeAlias = Callable[[Forward, Batch], Tensor]
"""(model, batch name -> (B, …)) -> (B,), each a function of its own example alone."""

# A contribution is scaled to this share of its bound, which leaves room for what float32 rounds
# off a norm and a product: 8 ulps.
ROOM = 1 - 8 * 2.0**-24


class Unsupported(Exception):
    """Why a model's per-example gradients cannot be had this way."""


class Bounds(NamedTuple):
    """How long one example's gradient may be.

    Args:
        clip_norm: of the whole, > 0; a tensor where the examples' bounds differ.
        layers: name -> bound of that parameter alone; ``None``: the whole is scaled by one factor.
    """

    clip_norm: float | Tensor
    layers: Mapping[str, float] | None = None

    def factors(self, squares: Tree) -> tuple[dict[str, Tensor], Tensor]:
        """What each example's gradient is scaled by, and which examples have none.

        Args:
            squares: name -> (B,) float32: squared L2 norms of each parameter's gradient. Of any
                other shape alike.

        Returns:
            name -> (B,) float32, 0 for the examples without; and (B,) bool: False where a norm is
            not finite, so that the example's gradient must not be added at all.
        """
        total = torch.stack([s.double() for s in squares.values()]).sum(0)
        finite = total.isfinite()
        if self.layers is None:
            one = _factor(total, self.clip_norm, finite)
            return dict.fromkeys(squares, one), finite
        return {n: _factor(s.double(), self.layers[n], finite) for n, s in squares.items()}, finite


def _factor(squares: Tensor, bound: float | Tensor, finite: Tensor) -> Tensor:
    # Where the norm is 0, so is the gradient, whatever it is multiplied by.
    scale = (bound * ROOM / squares.sqrt().clamp(min=1e-300)).clamp(max=1.0)
    return torch.where(finite, scale, 0.0).float()


def even(clip_norm: float, names: list[str]) -> Bounds:
    """Per-layer bounds that share ``clip_norm`` evenly: each clip_norm / sqrt(parameters)."""
    each = math.nextafter(clip_norm / math.sqrt(max(len(names), 1)), 0.0)
    return Bounds(clip_norm, dict.fromkeys(names, each))


class ClippedSum(NamedTuple):
    """The sum over a batch.

    Args:
        total: name -> (*shape) float32: the sum of the clipped gradients; at most ``clip_norm`` of
            it is any one example's.
        short: how many examples' gradients were at most as long as their bound. Private: to use
            it is a release.
    """

    total: dict[str, Tensor]
    short: int


class Method(Protocol):
    """One way to compute the sum."""

    def __call__(self, batch: Batch, bounds: Bounds) -> ClippedSum:
        """The sum over ``batch``, which has at least one example."""


def without(batch: Batch, kept: Tensor) -> dict[str, Tensor]:
    """The examples of ``batch`` where ``kept`` (B,)."""
    return {name: column[kept] for name, column in batch.items()}


def nothing(params: Tree) -> ClippedSum:
    """The sum over no examples."""
    return ClippedSum({n: torch.zeros_like(p, dtype=torch.float32) for n, p in params.items()}, 0)


def short(squares: Tree, bounds: Bounds, finite: Tensor) -> int:
    """How many gradients were no longer than ``clip_norm``."""
    total = torch.stack([s.double() for s in squares.values()]).sum(0)
    return int((finite & (total.sqrt() <= bounds.clip_norm)).sum())
