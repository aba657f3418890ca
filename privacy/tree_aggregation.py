"""Correlated noise by a binary tree: every prefix sum is at most log2(n) + 1 noisy nodes.

Rounds are leaves 0 … n - 1. Node (level, i) holds the sum of the rounds i 2^level …
(i + 1) 2^level - 1, plus noise of its own. The first t rounds are the nodes that the binary digits
of t name: those have an even i, so that odd ones are never released and cost nothing.

Source: Kairouz et al. 2021, DP-FTRL, Algorithm 1 (arXiv:2103.00039); the tree is that of Dwork et
al. 2010 and Chan, Shi and Song 2011, without the smoothing of Honaker 2015.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.privacy.matrix_factorisation import Participation

F64: TypeAlias = npt.NDArray[np.float64]
Node: TypeAlias = tuple[int, int]


def nodes(rounds: int) -> frozenset[Node]:
    """The nodes, (level, i), whose sum is the sum of the first ``rounds`` rounds."""
    levels = [level for level in range(rounds.bit_length()) if rounds >> level & 1]
    return frozenset((level, (rounds >> level) - 1) for level in levels)


def strategy_matrix(rounds: int) -> tuple[F64, F64]:
    """C, (nodes, n), rounds of a node, and B, (n, nodes), nodes of a prefix; B C sums prefixes."""
    names = sorted(frozenset().union(*(nodes(t) for t in range(1, rounds + 1))))
    sums, prefixes = np.zeros((len(names), rounds)), np.zeros((rounds, len(names)))
    for place, (level, i) in enumerate(names):
        sums[place, i << level : (i + 1) << level] = 1
    for t in range(1, rounds + 1):
        for node in nodes(t):
            prefixes[t - 1, names.index(node)] = 1
    return sums, prefixes


def sensitivity(who: Participation) -> float:
    """How far one unit of norm 1 a round can move the nodes, in L2: an upper bound, rounded up.

    Each level by itself: a node of 2^level rounds holds a unit at most ceil(2^level / b) times, and
    the fullest nodes are the worst. Exact for one participation, and where n and b are powers of
    two.
    """
    square = 0
    for level in range(who.rounds.bit_length()):
        there = (who.rounds >> level) + 1 >> 1  # the complete nodes with an even i
        full = min(who.times, -(-(1 << level) // who.separation))
        whole = min(who.times // full, there)
        rest = who.times - whole * full if whole < there else 0
        square += whole * full**2 + rest**2
    return math.sqrt(square) * (1 + 1e-12)


def errors(who: Participation) -> F64:
    """Std of the noise in every prefix sum, (n,), for a noise multiplier and a clip norm of 1."""
    counts = [t.bit_count() for t in range(1, who.rounds + 1)]
    std: F64 = np.sqrt(np.array(counts, dtype=float)) * sensitivity(who)
    return std
