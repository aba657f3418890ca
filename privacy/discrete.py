"""Exact discrete Gaussian noise: integers, with exactly the probabilities that the proofs name.

A floating point value decides a draw only where its error cannot change the decision. Where it
could, once in 2^35 draws or so, the draw is decided by interval arithmetic over as many further
random bits as it takes. So the samples are exact, at the speed of floating point.
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.privacy.streams import U64, Stream

I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]

# Above any error of the float64 expressions below, relative to the terms that they add up.
_ERROR = 2.0**-46

# Draws per block: what stays in the processor's second-level cache.
_BLOCK = 1 << 15

# Products of these, up to 45 times as large, are exact in float64.
MOST = 2.0**40


def discrete_gaussian(
    stream: Stream, variance: float | Fraction, n: int, error: float = _ERROR
) -> I64:
    """``n`` independent draws of the discrete Gaussian N_Z(0, variance), shape (n,).

    P(x) is proportional to exp(-x^2 / (2 variance)) over the integers.

    Args:
        stream: of random words.
        variance: sigma^2, in [0, 2^80], taken as the exact rational that it is; 0 gives zeros.
        n: how many.
        error: what the filter takes a float64 expression to be off by; larger values only send more
            draws to exact arithmetic.

    Raises:
        InputError: the variance is out of bounds.

    Source: Canonne, Kamath and Steinke 2020, Algorithm 3 (arXiv:2004.00010): rejection from a
    discrete Laplace, which is drawn as the floor of an exponential variate.
    """
    if not 0 <= variance <= MOST**2:
        raise InputError(
            f"variance {variance} is not in [0, 2^80]",
            where="discrete Gaussian",
            fix="choose a coarser scale",
        )
    exact = Fraction(variance)
    if exact == 0:
        return np.zeros(n, dtype=np.int64)
    t = math.isqrt(math.floor(exact)) + 1
    out = np.empty(n, dtype=np.int64)
    filled = 0
    while filled < n:
        count = min(_BLOCK, (n - filled) * 3 // 2 + 16)
        words = stream.words(2 * count)
        found = _trials(stream, words[:count], words[count:], exact, t, error)[: n - filled]
        out[filled : filled + len(found)] = found
        filled += len(found)
    return out


def _trials(
    stream: Stream, first: U64, second: U64, variance: Fraction, t: int, error: float
) -> I64:
    """The accepted ones of as many trials as there are words."""
    magnitude = _laplace(stream, first, t, error)
    keep = _accept(stream, second, magnitude, variance, t, error)
    negative = (second & np.uint64(1)).astype(bool)
    keep &= ~(negative & (magnitude == 0))  # minus zero would count zero twice
    signed: I64 = np.where(negative, -magnitude, magnitude)
    return signed[keep]


def _laplace(stream: Stream, words: U64, t: int, error: float) -> I64:
    """floor(-t log U), exactly: P(X >= k) = exp(-k / t)."""
    u = words.astype(np.float64) + 0.5
    log = -np.log(u * 2.0**-64)
    y = t * log
    floor = np.floor(y)
    # The word stands for an interval of width 2^-64: relative to u, half of 1 / (word + 1/2).
    margin = t * (error * (log + 1) + 1 / u)
    unsure = np.minimum(y - floor, floor + 1 - y) <= margin
    out: I64 = floor.astype(np.int64)
    for i in np.flatnonzero(unsure):
        out[i] = _exact_floor(stream, int(words[i]), t)
    return out


def _accept(
    stream: Stream, words: U64, magnitude: I64, variance: Fraction, t: int, error: float
) -> npt.NDArray[np.bool_]:
    """Whether U < exp(-(x - variance / t)^2 / (2 variance)), exactly; U of the upper 63 bits."""
    sigma2 = float(variance)
    u = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-63
    distance: F64 = np.asarray(magnitude - sigma2 / t, dtype=np.float64)
    gamma = distance * distance / (2 * sigma2)
    p = np.exp(-gamma)
    wrong = np.abs(distance) * (magnitude + sigma2 / t) / sigma2 + gamma + 1
    margin = p * wrong * error + u * error + 2.0**-62
    accept: npt.NDArray[np.bool_] = u < p
    for i in np.flatnonzero(np.abs(u - p) <= margin):
        accept[i] = _exact_less(stream, int(words[i]) >> 1, int(magnitude[i]), variance, t)
    return accept


def _exact_floor(stream: Stream, word: int, t: int) -> int:
    bits = 64
    while True:
        # U is in [word, word + 1] / 2^bits, and decimal logarithms are rounded correctly.
        with localcontext(prec=bits // 2):
            slack = Decimal(10) ** (6 - bits // 2) * t * bits
            low = -t * (Decimal(word + 1) / 2**bits).ln() - slack
            high = -t * (Decimal(word) / 2**bits).ln() + slack
            if low >= 0 and high.is_finite() and math.floor(low) == math.floor(high):
                return int(low)
        word, bits = _more(stream, word, bits)


def _exact_less(stream: Stream, word: int, magnitude: int, variance: Fraction, t: int) -> bool:
    gamma = (magnitude - variance / t) ** 2 / (2 * variance)
    bits = 63
    while True:
        with localcontext(prec=bits // 2):
            exponent = Decimal(gamma.numerator) / gamma.denominator
            p = (-exponent).exp()
            slack = Decimal(10) ** (6 - bits // 2) * (1 + exponent)
            if Decimal(word + 1) / 2**bits <= p - slack:
                return True
            if Decimal(word) / 2**bits >= p + slack:
                return False
        word, bits = _more(stream, word, bits)


def _more(stream: Stream, word: int, bits: int) -> tuple[int, int]:
    return word << 64 | int(stream.words(1)[0]), bits + 64
