"""Rules that choose or weigh whole rows, by the distances between them."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.strategies.parts.robust_rows import squared_distances

TIE = 1e-9
"""Scores that differ by less, relative to their size, are equal: duplicates make such, and their
last bits depend on how a machine multiplies."""


def krum_scores(distances: Tensor, f: int) -> Tensor:
    """(n,): for each row the sum of its squared distances to its nearest neighbours.

    Of n rows the nearest n - f - 2 others count; one at least, so that the last rounds of Bulyan,
    when few rows are left, are defined.

    Source: Blanchard et al. 2017, section 4 (arXiv:1703.02757).
    """
    nearest = distances.clone().fill_diagonal_(-1.0).sort(1).values[:, 1:]
    return nearest[:, : max(1, len(distances) - f - 2)].sum(1)


def lowest(scores: Tensor) -> int:
    """The place of the lowest score; of those that are equal up to rounding, the first."""
    return int((scores <= scores.min() * (1 + TIE)).nonzero()[0, 0])


def lowest_scores(around: Tensor, f: int, m: int) -> Tensor:
    """(1, n): the mean of the m rows of lowest score; of equal ones the earlier by name."""
    scores = krum_scores(squared_distances(around), f)
    weights = torch.zeros(1, len(around), dtype=torch.float64)
    for _ in range(m):
        best = lowest(scores)
        weights[0, best] = 1 / m
        scores[best] = float("inf")
    return weights


def repeated_krum(around: Tensor, f: int) -> Tensor:
    """(n - 2f, n): the rows that Krum picks one after another, each among those that are left.

    Source: El Mhamdi, Guerraoui and Rouault 2018, section 4 (arXiv:1802.07927).
    """
    distances = squared_distances(around)
    left = list(range(len(around)))
    chosen = []
    for _ in range(len(around) - 2 * f):
        chosen.append(left.pop(lowest(krum_scores(distances[left][:, left], f))))
    return torch.eye(len(around), dtype=torch.float64)[chosen]


def weiszfeld(around: Tensor, nu: float, iterations: int) -> Tensor:
    """(1, n): the weights of the rows in their geometric median.

    Every iterate is a mean of the rows, so its distances to them follow from the Gram matrix.

    Args:
        around: (n, n), the Gram matrix of the rows around any origin.
        nu: distances below it count as it.
        iterations: at most; it stops where no weight changes.

    Source: Pillutla, Kakade and Harchaoui 2022, Algorithm 2 (arXiv:1912.13445).
    """
    # From a mean in which no row counts for more than its distance from the middle allows: from the
    # plain mean, huge rows would be left behind only little by little.
    first = squared_distances(around).median(1).values.sqrt()
    weights = 1 / first.clamp(min=max(nu, float(first.median())))
    weights /= weights.sum()
    for _ in range(iterations):
        inner = around @ weights  # of each row with the iterate
        far = (around.diagonal() - 2 * inner + weights @ inner).clamp(min=0.0).sqrt()
        updated = 1 / far.clamp(min=nu)
        updated /= updated.sum()
        change = float(((updated - weights) / updated).abs().max())
        weights = updated
        if change < 1e-12:
            break
    return weights[None]
