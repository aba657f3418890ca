"""What is done to the rows of a cohort before a robust rule sees them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from umbel.core import randomness
from umbel.core.settings import Positive
from umbel.strategies.parts.robust_rows import squared_distances

Mixing: TypeAlias = Literal["none", "nnm", "bucketing"]

ClipNorm: TypeAlias = Positive | Literal["adaptive"] | None

Mix: TypeAlias = Callable[[Tensor], Tensor]
"""The Gram matrix (n, n) of the rows around any origin -> (m, n), whose rows sum to 1: each of the
m new rows is a mean of old ones."""


def premix(mixing: Mixing, f: int, bucket_size: int, round_number: int) -> list[Mix]:
    """The pre-step ``mixing``, if any."""
    if mixing == "nnm":
        return [lambda around: nearest_neighbours(around, f)]
    if mixing == "bucketing":
        return [lambda around: buckets(len(around), bucket_size, round_number)]
    return []


def nearest_neighbours(around: Tensor, f: int) -> Tensor:
    """Each row becomes the mean of the n - f rows that are nearest to it, itself among them.

    Of rows equally near, those of clients earlier by name are taken.

    Source: Allouah et al. 2023, NNM, Algorithm 2 (arXiv:2302.01772).
    """
    n = len(around)
    distances = squared_distances(around).fill_diagonal_(-1.0)  # itself before its duplicates
    nearest = distances.argsort(dim=1, stable=True)[:, : n - f]
    return torch.zeros_like(around).scatter_(1, nearest, 1 / (n - f))


def buckets(n: int, size: int, round_number: int) -> Tensor:
    """The (ceil(n / size), n) matrix that shuffles the rows and averages them by ``size``.

    The shuffle is a function of the round alone, so that every engine deals the same; the last
    bucket may be smaller.

    Source: Karimireddy, He and Jaggi 2022, Algorithm 1 (arXiv:2006.09365).
    """
    order = randomness.permutation(randomness.key(0, "bucketing", round_number), n)
    matrix = torch.zeros(math.ceil(n / size), n, dtype=torch.float64)
    for i, row in enumerate(matrix):
        members = torch.from_numpy(order[i * size : (i + 1) * size])
        row[members] = 1 / len(members)
    return matrix


def clip_scale(norms: Tensor, clip_norm: ClipNorm, f: int) -> Tensor:
    """(n,): what each row is multiplied by, so that none is longer than ``clip_norm``.

    ``adaptive`` shortens the ``floor(2 f / n (n - f))`` longest rows to the length of the next:
    Allouah et al. 2024, ARC, Algorithm 2 (arXiv:2405.14432).

    Args:
        norms: (n,), the L2 norms of the rows; infinite where the square overflowed.
        clip_norm: the bound; ``None``: none.
        f: hostile rows.
    """
    n = len(norms)
    if clip_norm == "adaptive":
        clip_norm = float(norms.sort(descending=True).values[(2 * f * (n - f)) // n])
    bound = float("inf") if clip_norm is None else clip_norm
    scale = torch.where(norms > bound, bound / norms, 1.0)
    # What is too long to have a length would leave nobody a distance: it counts as zero.
    return torch.where(norms.isfinite(), scale, 0.0)
