"""Correlated noise for runs whose cohorts are not drawn by independent coins.

What a run reveals are the prefix sums A x of its rounds' clipped sums x. With A = B C, noise goes
to C x and comes out as B z = A (C^-1 z): every round's sum gets (C^-1 z)_t, whose prefix sums stay
small because each draw is partly taken back later. One Gaussian release of C x pays for the whole
run; its sensitivity is how far one unit can move C x. That needs no sampling at all, but a bound on
how often, and how soon again, a unit takes part.

Here C is a lower triangular band: noise of the last b - 1 rounds is all that a round needs.

Source: Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization" (arXiv:2306.08153).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError

F64: TypeAlias = npt.NDArray[np.float64]

WHERE = "correlated noise"


@dataclass(frozen=True)
class Participation:
    """How often one unit may take part, and how soon again.

    Args:
        rounds: n, of the whole run.
        separation: b: a unit that took part sits out the next b - 1 rounds, at least.
        most: k, rounds that a unit takes part in at most; ``None``: as many as fit.

    Raises:
        InputError: one of them is below 1.
    """

    rounds: int
    separation: int
    most: int | None = None

    def __post_init__(self) -> None:
        if min(self.rounds, self.separation, 1 if self.most is None else self.most) < 1:
            raise InputError(
                f"rounds {self.rounds}, separation {self.separation}, most {self.most}",
                where=WHERE,
                fix="give numbers of at least 1",
            )

    @property
    def times(self) -> int:
        """k, and never more than fit."""
        fit = -(-self.rounds // self.separation)
        return fit if self.most is None else min(self.most, fit)


def square_root(band: int) -> tuple[float, ...]:
    """The first ``band`` coefficients of the square root of the prefix sums, (band,).

    c_0 = 1, c_j = c_{j-1} (2 j - 1) / (2 j): as good as any band to a constant, without a search.
    A band of 1 is independent noise.

    Source: Fichtenberger, Henzinger and Upadhyay 2023 (arXiv:2202.11205); cut to a band: Kalinin
    and Lampert 2024, Definition 1 (arXiv:2405.13763).
    """
    if band < 1:
        raise InputError(f"a band of {band}", where=WHERE, fix="give at least 1")
    found = [1.0]
    for j in range(1, band):
        found.append(found[-1] * (2 * j - 1) / (2 * j))
    return tuple(found)


def strategy_matrix(coefficients: tuple[float, ...], rounds: int) -> F64:
    """C, (n, n): coefficient j on the j-th diagonal below the main one. For tests and pictures."""
    matrix = np.zeros((rounds, rounds))
    for j, c in enumerate(coefficients[:rounds]):
        matrix += c * np.eye(rounds, k=-j)
    return matrix


def inverse(coefficients: tuple[float, ...], rounds: int) -> F64:
    """The first column of C^-1, (n,): how much of a draw enters its round and each one after it."""
    c = np.asarray(coefficients)
    found = np.zeros(rounds)
    found[0] = 1 / c[0]
    for t in range(1, rounds):
        back = c[1 : t + 1]
        found[t] = -np.dot(back, found[t - len(back) : t][::-1]) / c[0]
    return found


def sensitivity(coefficients: tuple[float, ...], who: Participation) -> float:
    """How far one unit of norm 1 a round can move C x, in L2: an upper bound, rounded up.

    Exact where the band is at most the separation: a unit's columns then never overlap, and add up
    as squares. Where they do, the closest pattern is the worst for coefficients that fall towards
    0, and lengths add for all others.

    Source: Choquette-Choo et al. 2023, Theorem 2 (arXiv:2306.08153).
    """
    c = np.asarray(coefficients[: who.rounds])
    total, k, b = np.cumsum(c**2), who.times, who.separation
    if len(c) <= b or k == 1:
        # The column of round t has the rows t … n - 1, at most as many as coefficients.
        rows = np.minimum(len(c), np.arange(who.rounds, 0, -1))
        square = _heaviest(total[rows - 1], who)
    elif (c >= 0).all() and (np.diff(c) <= 0).all():
        gram = [float(c[gap:] @ c[: len(c) - gap]) for gap in range(0, len(c), b)][:k]
        square = k * gram[0] + sum(2 * (k - i) * g for i, g in enumerate(gram[1:], 1))
    else:
        square = k * k * float(total[-1])
    return math.sqrt(square) * (1 + 1e-12)


def _heaviest(squares: F64, who: Participation) -> float:
    """The largest sum of ``times`` of these, no two nearer than the separation."""
    best = np.zeros(len(squares) + who.separation)
    for _ in range(who.times):
        taken = squares + best[who.separation :]
        best[: len(squares)] = np.maximum.accumulate(taken[::-1])[::-1]
        best[len(squares) :] = 0.0
    return float(best[0])


def errors(coefficients: tuple[float, ...], who: Participation) -> F64:
    """Std of the noise in every prefix sum, (n,), for a noise multiplier and a clip norm of 1."""
    column = np.cumsum(inverse(coefficients, who.rounds))  # of B = A C^-1
    std: F64 = np.sqrt(np.cumsum(column**2)) * sensitivity(coefficients, who)
    return std


def best_band(who: Participation) -> tuple[float, ...]:
    """The square root's band, of at most the separation, with the least mean square error."""
    widths = sorted({min(1 << i, who.separation) for i in range(who.separation.bit_length() + 1)})
    return min(
        (square_root(width) for width in widths),
        key=lambda c: float(np.mean(errors(c, who) ** 2)),
    )
