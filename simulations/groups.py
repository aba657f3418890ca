"""How a cohort is cut into parts that are trained and summed each by itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from umbel.simulations.chunks import Places

MOST = 128
"""Groups of a round. Each costs a message and a sum of the model's size; so few are enough to keep
as many workers busy until nearly the end of a round."""


class Group(NamedTuple):
    """Chunks that one process trains one after another.

    Args:
        chunks: the places of their clients, an array each.
        cost: examples that their clients hold.
    """

    chunks: Sequence[Places]
    cost: float


def groups(dealt: Sequence[Places], costs: Sequence[float]) -> list[Group]:
    """Joins consecutive chunks to at most :data:`MOST` groups of about the same cost.

    Up to so many chunks, each is a group of its own.

    A function of the cohort and the plan alone, and not of the number of processes: sums are taken
    within a group, and then over the groups in their order, and another cut would give other bits.

    Args:
        dealt: the chunks.
        costs: of each, above 0.
    """
    if len(dealt) <= MOST:
        return [Group([chunk], cost) for chunk, cost in zip(dealt, costs, strict=True)]
    # A chunk goes where its middle lies, so that the groups are as near to equal as they can be.
    ends = np.cumsum(costs)
    of = np.minimum((ends - np.asarray(costs) / 2) // (ends[-1] / MOST), MOST - 1)
    starts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(dealt)]
    return [
        Group(list(dealt[start:end]), sum(costs[start:end]))
        for start, end in itertools.pairwise(starts)
    ]
