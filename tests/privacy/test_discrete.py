from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from umbel.core.errors import InputError
from umbel.privacy import discrete
from umbel.privacy.discrete import discrete_gaussian
from umbel.privacy.streams import U64, Stream, seeded_stream, system_stream

FALSE_ALARM = 1e-6
N = 200_000


def expected(variance: float) -> tuple[np.ndarray, np.ndarray]:
    """The support that matters, and exact probabilities."""
    reach = math.ceil(12 * math.sqrt(variance)) + 2
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * variance))
    return support, weights / weights.sum()


def p_value(draws: np.ndarray, variance: float) -> float:
    """Chi-squared over cells that expect at least ten."""
    support, p = expected(variance)
    counts = np.array([(draws == x).sum() for x in support])
    rare = p * len(draws) < 10
    found = np.append(counts[~rare], len(draws) - counts[~rare].sum())
    wanted = np.append(p[~rare], 1 - p[~rare].sum()) * len(draws)
    if wanted[-1] < 1:
        found, wanted = found[:-1], wanted[:-1] * found[:-1].sum() / wanted[:-1].sum()
    return float(stats.chisquare(found, wanted).pvalue)


@pytest.mark.parametrize("variance", [0.2, 1.0, 13.7, 400.0])
def test_accepts_sigma_and_rejects_two_thirds_and_three_halves(variance: float) -> None:
    draws = discrete_gaussian(system_stream(), variance, N)
    assert p_value(draws, variance) > FALSE_ALARM
    assert p_value(draws, variance * 4 / 9) < 1e-100
    assert p_value(draws, variance * 9 / 4) < 1e-100


@pytest.mark.parametrize("std", [1e3, 1e6, 2.0**39])
def test_wide_noise_is_gaussian(std: float) -> None:
    draws = discrete_gaussian(system_stream(), std**2, N) / std
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(draws, "norm", args=(0, 2 / 3)).pvalue < 1e-100
    assert int(np.abs(draws).max() * std) > 4 * std


@pytest.mark.parametrize("variance", [0.05, 1.0, Fraction(27, 10), 13.7, 1e9])
def test_the_filter_decides_as_exact_arithmetic_does(variance: float | Fraction) -> None:
    fast = discrete_gaussian(seeded_stream(5, "x"), variance, 3000)
    # An error of 1 sends every draw to intervals of decimals.
    exact = discrete_gaussian(seeded_stream(5, "x"), variance, 3000, error=1.0)
    assert np.array_equal(fast, exact)


def test_words_that_decide_nothing_are_continued() -> None:
    asked: list[int] = []

    def words(n: int) -> U64:
        asked.append(n)
        return np.full(n, 1 << 63, dtype=np.uint64)

    # U in [0, 2^-64] has no least logarithm; continued, it is 2^-65.
    zero = np.zeros(1, dtype=np.uint64)
    drawn = discrete._laplace(Stream("seeded", words), zero, 101, 2.0**-46)
    assert drawn.tolist() == [math.floor(101 * 65 * math.log(2))]
    assert asked == [1]


def test_symmetric_with_the_right_share_of_zeros() -> None:
    draws = discrete_gaussian(system_stream(), 0.5, N)
    support, p = expected(0.5)
    assert stats.binomtest(int((draws == 0).sum()), N, p[support == 0][0]).pvalue > FALSE_ALARM
    signed = draws[draws != 0]
    assert stats.binomtest(int((signed > 0).sum()), len(signed)).pvalue > FALSE_ALARM


def test_bounds() -> None:
    assert discrete_gaussian(system_stream(), 0.0, 4).tolist() == [0, 0, 0, 0]
    assert discrete_gaussian(system_stream(), 1.0, 0).shape == (0,)
    for wrong in (-1.0, math.nan, 2.0**81):
        with pytest.raises(InputError, match="variance"):
            discrete_gaussian(system_stream(), wrong, 1)
