"""A lower bound on epsilon from ONE run: how many of many coins can be guessed from its output.

m canaries are each included by a fair coin. Whoever sees the output guesses some of the coins.
Under (epsilon, delta)-DP the number of correct guesses is hardly above that of randomised response,
so that more of them refute the epsilon, with a confidence that no modelling enters.

Source: Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run",
Algorithm 1 and Theorem 5.2 (arXiv:2305.08846).
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.privacy.audits.binomial import masses

F64: TypeAlias = npt.NDArray[np.float64]
Coins: TypeAlias = npt.NDArray[np.bool_]

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the canaries that are guessed. Each is a test of its own; the confidence is shared."""

MOST = 50.0
"""A bound above this is this."""


class Bound(NamedTuple):
    """What the guesses prove.

    Args:
        epsilon: the run is not (epsilon', delta)-DP for any epsilon' below this, with
        confidence: of being right.
        delta: of the guarantee.
        canaries: m.
        guesses: r, canaries that were guessed.
        correct: v, of them right.
    """

    epsilon: float
    confidence: float
    delta: float
    canaries: int
    guesses: int
    correct: int


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """P(at least so many correct guesses), at most, of whatever is (epsilon, delta)-DP.

    Source: Theorem 5.2: the tail of Binomial(r, e^epsilon / (1 + e^epsilon)), plus
    2 m delta max_i P(v - i <= . < v) / i.
    """
    mass = masses(guesses, 1 / (1 + math.exp(-epsilon)))
    tail = float(mass[correct:].sum())
    below = np.cumsum(mass[:correct][::-1])  # P(v - i <= . < v), i = 1 … v
    alpha = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * alpha)


def refuted(canaries: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest epsilon, rounded down, that the guesses refute; 0 where they refute none.

    Args:
        error: the probability of being wrong.
    """
    if p_value(canaries, guesses, correct, 0.0, delta) > error:
        return 0.0
    low, high = 0.0, MOST
    while high - low > 1e-4:
        middle = (low + high) / 2
        refutes = p_value(canaries, guesses, correct, middle, delta) <= error
        low, high = (middle, high) if refutes else (low, middle)
    return low


def audit(scores: F64, included: Coins, delta: float, confidence: float = 0.95) -> Bound:
    """The best bound that the scores of the canaries give.

    The highest scores are guessed to be in, as many of the lowest to be out. How many is tried over
    :data:`SHARES`, each at its part of the error, so that the best one may be taken.

    Args:
        scores: (m,), higher where the output looks more as if the canary was in.
        included: (m,), the fair and independent coins; not known to whoever made the scores.
        delta: of the guarantee that is tested.
        confidence: of the bound, all shares together.

    Raises:
        InputError: no canary, other shapes, or a score that is not a number.
    """
    m = len(scores)
    if not m or scores.shape != included.shape or bool(np.isnan(scores).any()):
        raise InputError(
            f"scores {scores.shape}, coins {included.shape}",
            where="one-run audit",
            fix="give each canary one score that is a number, and one coin",
        )
    order = np.argsort(scores, kind="stable")
    found = []
    for share in SHARES:
        each = max(1, math.floor(share * m / 2))
        guesses = min(2 * each, m)
        low, high = order[:each], order[m - (guesses - each) :]
        correct = int((~included[low]).sum() + included[high].sum())
        error = (1 - confidence) / len(SHARES)
        epsilon = refuted(m, guesses, correct, delta, error)
        found.append(Bound(epsilon, confidence, delta, m, guesses, correct))
    return max(found, key=lambda bound: bound.epsilon)
