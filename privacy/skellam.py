"""Exact Skellam noise: integers whose sums over clients are Skellam again, whoever drops out.

A draw inverts the cumulative distribution. Probabilities are enclosed from below and above by
integer arithmetic, to far more digits than a random word has; a word that falls between the two
enclosures is continued by further random bits and decided with finer ones. So the samples are
exact, at the speed of a table look-up.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.privacy.streams import U64, Stream

I64: TypeAlias = npt.NDArray[np.int64]

# The upper 63 bits of a word decide the magnitude, the lowest one the sign.
_BITS = 63
# Digits of the first enclosure: cells that it cannot decide have a probability of about 2^-60.
_PRECISION = 128
# Further bits that weights are kept to, so that the rounding of a million of them is nothing.
_GUARD = 64

MOST = 2.0**30
"""The largest variance: its table has 450,000 entries and takes some seconds to make, once."""


def skellam(stream: Stream, variance: float | Fraction, n: int, precision: int = _PRECISION) -> I64:
    """``n`` independent draws of the symmetric Skellam distribution, shape (n,).

    P(x) = exp(-variance) I_|x|(variance), with the modified Bessel function I: the difference of
    two Poisson variates of mean variance / 2 each.

    Args:
        stream: of random words.
        variance: mu, in [0, 2^30], taken as the exact rational that it is; 0 gives zeros.
        n: how many.
        precision: bits of the first enclosure; fewer only send more draws to the finer ones.

    Raises:
        InputError: the variance is out of bounds.

    Source: Agarwal, Kairouz and Liu 2021, Definition 3.1 (arXiv:2110.04995).
    """
    if not 0 <= variance <= MOST:
        raise InputError(
            f"variance {variance} is not in [0, 2^30]",
            where="Skellam noise",
            fix="choose a coarser scale, that is fewer bits, or discrete Gaussian noise",
        )
    exact = Fraction(variance)
    if exact == 0:
        return np.zeros(n, dtype=np.int64)
    words = stream.words(n)
    u = words >> np.uint64(1)
    table = _table(exact, precision)
    magnitude: I64 = np.searchsorted(table.above, u, side="right").astype(np.int64)
    # U is in [u, u + 1): sure where that lies between the enclosures on either side.
    after = table.below[np.minimum(magnitude, len(table.below) - 1)]
    sure = (magnitude < len(table.below)) & (u < after)
    for i in np.flatnonzero(~sure):
        magnitude[i] = _decide(stream, int(u[i]), exact, precision)
    return np.where(words & np.uint64(1), -magnitude, magnitude)


class _Table(NamedTuple):
    """P(|X| <= k) in units of 2^-63, k = 0, 1, …: rounded down, and rounded up."""

    below: U64
    above: U64


@lru_cache(maxsize=8)
def _table(variance: Fraction, precision: int) -> _Table:
    low, high = _cumulative(variance, precision)
    return _Table(
        np.array([(c << _BITS) >> precision for c in low], dtype=np.uint64),
        np.array([-((-c << _BITS) >> precision) for c in high], dtype=np.uint64),
    )


def _decide(stream: Stream, word: int, variance: Fraction, precision: int) -> int:
    """The magnitude that a word stands for, with as many further bits as it takes."""
    bits = _BITS
    while True:
        word, bits = word << 64 | int(stream.words(1)[0]), bits + 64
        precision = max(precision, bits) + 64
        low, high = _cumulative(variance, precision)
        down = precision - bits
        # U is in [word, word + 1) / 2^bits; the enclosures are in units of 2^-precision.
        first, last = word << down, (word + 1) << down
        place = _first_above(high, first)
        if place < len(low) and last <= low[place]:
            return place


def _first_above(values: list[int], bound: int) -> int:
    """The first place whose value is above ``bound``; values do not decrease."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if values[middle] > bound else (middle + 1, high)
    return low


@lru_cache(maxsize=4)
def _cumulative(variance: Fraction, precision: int) -> tuple[list[int], list[int]]:
    """Bounds on P(|X| <= k), k = 0, 1, …, in units of 2^-precision.

    The ratios r_k = I_k / I_{k-1} obey r_k = 1 / (2 k / mu + r_{k+1}), lie in [0, 1] and fall with
    k, so that the mass beyond the last weight w_n is below w_n r / (1 - r) with r = r_{n+1}.

    Source: Amos 1974 for the recurrence (doi:10.1090/S0025-5718-1974-0333287-7).
    """
    digits = precision + _GUARD
    one = 1 << digits
    a, b = variance.numerator, variance.denominator
    # Weights fall about as exp(-k^2 / (2 mu)), later faster: below 2^-precision by half of this.
    count = 2 * int((2 * float(variance) * precision) ** 0.5) + precision
    ratios: list[tuple[int, int]] = []
    low, high = 0, one
    for k in range(count + 1, 0, -1):
        slope = 2 * k * b * one
        low, high = (
            one * one // (-(-slope // a) + high),
            min(one, -(-(one * one) // (slope // a + low))),
        )
        ratios.append((low, high))
    ratios.reverse()
    lows, highs = [one], [one]  # weights: 1 for 0, then 2 I_k / I_0, both signs together
    for k in range(count):
        signs = 2 if k == 0 else 1
        lows.append(signs * lows[-1] * ratios[k][0] >> digits)
        highs.append(-(-signs * highs[-1] * ratios[k][1] >> digits))
        if highs[-1] >> _GUARD == 0:
            break
    beyond = ratios[len(highs) - 1][1]
    tail = -(-highs[-1] * beyond // (one - beyond))
    least, most = sum(lows), sum(highs) + tail
    unit = 1 << precision
    below, above = [], []
    total_low = total_high = 0
    for w_low, w_high in zip(lows, highs, strict=True):
        total_low, total_high = total_low + w_low, total_high + w_high
        # What lies beyond k is bounded better from its own side, where k is large.
        below.append(max(total_low * unit // most, unit - -(-(most - total_low) * unit // least)))
        above.append(min(unit, -(-total_high * unit // least)))
    return below, above
