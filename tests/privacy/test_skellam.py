from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import special, stats

from umbel.core.errors import InputError
from umbel.privacy.accounting import INTEGER_ORDERS, epsilon, rdp_epsilon
from umbel.privacy.distributed import decode, encode, plan, signs
from umbel.privacy.mechanisms import Gaussian, SkellamSum, dump, parse
from umbel.privacy.skellam import _cumulative, skellam
from umbel.privacy.streams import seeded_stream, system_stream

FALSE_ALARM = 1e-6
N = 200_000
GOLDEN = {"length": 1 << 17, "clip_norm": 1.0, "noise_multiplier": 1.0, "bits": 16, "clients": 100}


def p_value(draws: np.ndarray, variance: float) -> float:
    """Chi-squared over cells that expect at least ten."""
    reach = math.ceil(12 * math.sqrt(variance)) + 20
    support = np.arange(-reach, reach + 1)
    p = special.ive(np.abs(support), variance)
    counts = np.array([(draws == x).sum() for x in support])
    rare = p * len(draws) < 10
    found = np.append(counts[~rare], len(draws) - counts[~rare].sum())
    wanted = np.append(p[~rare], 1 - p[~rare].sum()) * len(draws)
    if wanted[-1] < 1:
        found, wanted = found[:-1], wanted[:-1] * found[:-1].sum() / wanted[:-1].sum()
    return float(stats.chisquare(found, wanted).pvalue)


@pytest.mark.parametrize("variance", [0.2, 1.0, 13.7, 400.0])
def test_accepts_the_variance_and_rejects_its_neighbours(variance: float) -> None:
    draws = skellam(system_stream(), variance, N)
    assert p_value(draws, variance) > FALSE_ALARM
    assert p_value(draws, variance * 4 / 9) < 1e-100
    assert p_value(draws, variance * 9 / 4) < 1e-100


def test_it_is_not_the_discrete_gaussian() -> None:
    # Excess kurtosis 1 / variance: at variance 1 the fourth moment is 4, a Gaussian's 3.
    draws = skellam(seeded_stream(1, "kurtosis"), 1.0, N).astype(float)
    error = math.sqrt(float(np.var(draws**4)) / N)
    assert abs(float(np.mean(draws**4)) - 4) < 5 * error
    assert float(np.mean(draws**4)) - 3 > 10 * error


def test_wide_noise_is_gaussian() -> None:
    draws = skellam(system_stream(), 1e6, N) / 1e3
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM
    assert stats.kstest(draws, "norm", args=(0, 2 / 3)).pvalue < 1e-100


@pytest.mark.parametrize("variance", [1e-9, 0.05, 1.0, Fraction(27, 10), 13.7, 4e3])
def test_the_table_decides_as_finer_ones_do(variance: float | Fraction) -> None:
    fast = skellam(seeded_stream(5, "x"), variance, 500)
    # Enclosures of three bits leave nearly every draw to the exact way.
    exact = skellam(seeded_stream(5, "x"), variance, 500, precision=3)
    assert np.array_equal(fast, exact)


@pytest.mark.parametrize("variance", [0.05, 1.0, 300.0, 12_345.6])
def test_enclosures_are_narrow_and_hold_the_probabilities(variance: float) -> None:
    low, high = _cumulative(Fraction(variance), 128)
    k = np.arange(len(low))
    exact = np.cumsum(np.where(k == 0, 1, 2) * special.ive(k, variance))
    found = np.array([c / 2**128 for c in low])
    np.testing.assert_allclose(found, exact, atol=1e-13)
    assert all(a <= b for a, b in zip(low, high, strict=True))
    assert max(b - a for a, b in zip(low, high, strict=True)) < 2**20
    assert 2**128 - low[-1] < 2**20


def test_bounds() -> None:
    assert skellam(system_stream(), 0.0, 4).tolist() == [0, 0, 0, 0]
    assert skellam(system_stream(), 1.0, 0).shape == (0,)
    for wrong in (-1.0, math.nan, 2.0**31):
        with pytest.raises(InputError, match="variance"):
            skellam(system_stream(), wrong, 1)


@pytest.mark.parametrize("variance", [2.0, 10.0, 100.0])
@pytest.mark.parametrize("shift", [1, 2])
def test_the_bound_holds_and_is_near_the_true_divergence(variance: float, shift: int) -> None:
    k = np.arange(-400, 401)
    log_p = np.log(special.ive(np.abs(k - shift), variance).clip(1e-300))
    log_q = np.log(special.ive(np.abs(k), variance).clip(1e-300))
    mechanism = SkellamSum(variance, shift, shift)
    for alpha in (2, 3, 5, 8):
        exact = special.logsumexp(alpha * log_p - (alpha - 1) * log_q) / (alpha - 1)
        assert exact <= mechanism.divergence(alpha) + 1e-12
        # One dimension has the worst ratio of L1 to L2: the excess is all that is lost.
        assert mechanism.divergence(alpha) < exact * (1 + 6 / variance)
        assert mechanism.divergence(alpha - 0.5) == mechanism.divergence(alpha)


def test_wide_noise_costs_what_a_gaussian_costs() -> None:
    wide = {SkellamSum(1e10, 1e5, 1e5 * math.sqrt(1e5)): 1}
    gaussian = rdp_epsilon({Gaussian(1.0): 1}, 1e-5, INTEGER_ORDERS)
    found = rdp_epsilon(wide, 1e-5, INTEGER_ORDERS)
    assert gaussian < found < gaussian * 1.001
    assert epsilon(wide, 1e-5).accountant == "rdp"  # PLD knows nothing of it


def test_golden_of_the_distributed_sum() -> None:
    # The bits, clients and length of the discrete Gaussian's golden: here 4.7544 as well, to 1e-3.
    found = rdp_epsilon({plan(**GOLDEN, noise="skellam").mechanism(): 1}, 1e-5, INTEGER_ORDERS)
    assert found == pytest.approx(4.7544, abs=2e-3)
    coarse = plan(**{**GOLDEN, "bits": 10}, noise="skellam").mechanism()
    assert rdp_epsilon({coarse: 1}, 1e-5) > 1.5 * found


def test_noise_in_the_sum_has_the_planned_std() -> None:
    agreed = plan(
        length=4096, clip_norm=1.0, noise_multiplier=0.8, bits=14, clients=10, noise="skellam"
    )
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    drawn = np.random.default_rng(0).normal(size=(10, 4096))
    updates = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    total = sum(encode(u, agreed, diagonal, system_stream()) for u in updates) % agreed.modulus
    error = decode(np.asarray(total), agreed, diagonal) - updates.sum(0)
    assert stats.kstest(error, "norm", args=(0, 0.8)).pvalue > FALSE_ALARM
    assert stats.kstest(error, "norm", args=(0, 0.8 * 2 / 3)).pvalue < 1e-30


def test_the_ledger_keeps_it() -> None:
    mechanism = SkellamSum(12.5, 3.0, 7.0)
    assert parse(dump(mechanism)) == mechanism
    assert rdp_epsilon({SkellamSum(0.0, 1.0, 1.0): 1}, 1e-5) == math.inf
    assert rdp_epsilon({SkellamSum(0.0, 0.0, 0.0): 1}, 1e-5) == 0.0
    with pytest.raises(InputError, match="Skellam"):
        SkellamSum(1.0, 2.0, 1.0)
