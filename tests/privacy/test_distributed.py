from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from umbel.core.errors import InputError
from umbel.privacy.accounting import INTEGER_ORDERS, epsilon, rdp_epsilon
from umbel.privacy.distributed import Grid, decode, encode, hadamard, plan, signs
from umbel.privacy.mechanisms import Gaussian
from umbel.privacy.streams import seeded_stream, system_stream

GOLDEN = {"length": 1 << 17, "clip_norm": 1.0, "noise_multiplier": 1.0, "bits": 16, "clients": 100}


def grid(**changes: Any) -> Grid:
    base = {"length": 100, "clip_norm": 1.0, "noise_multiplier": 0.5, "bits": 20, "clients": 10}
    return plan(**{**base, **changes})


def vectors(count: int, length: int, norm: float) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(count, length))
    return norm * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_golden() -> None:
    # Kairouz, Liu and Steinke 2021, with the orders and the grid of their code: the price of
    # integers, 16 bits and a sum of discrete Gaussians is 0.0016.
    found = {plan(**GOLDEN).mechanism(): 1}
    assert rdp_epsilon(found, 1e-5, INTEGER_ORDERS) == pytest.approx(4.7544, abs=5e-5)
    assert rdp_epsilon({Gaussian(1.0): 1}, 1e-5, INTEGER_ORDERS) == pytest.approx(4.7527, abs=5e-5)
    # Finer orders say a little less of the same sum.
    assert epsilon(found, 1e-5).epsilon == pytest.approx(4.7303, abs=5e-5)


def test_fewer_bits_cost_privacy() -> None:
    costs = [
        rdp_epsilon({plan(**{**GOLDEN, "bits": bits}).mechanism(): 1}, 1e-5)
        for bits in (10, 12, 16)
    ]
    assert costs[0] > 1.5 * costs[2]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] > rdp_epsilon({Gaussian(1.0): 1}, 1e-5)


def test_noise_is_sized_for_the_fewest_survivors() -> None:
    strict, trusting = plan(**GOLDEN, survivors=60), plan(**GOLDEN)
    share = float(strict.noise_variance) * strict.step**2
    assert share == pytest.approx(1 / 60, rel=1e-9)
    assert float(trusting.noise_variance) * trusting.step**2 == pytest.approx(1 / 100, rel=1e-9)
    # With 60 left the guarantee is that of the planned multiplier, to what integers cost.
    gaussian = rdp_epsilon({Gaussian(1.0): 1}, 1e-5)
    assert gaussian < rdp_epsilon({strict.mechanism(): 1}, 1e-5) < 1.001 * gaussian


@pytest.mark.parametrize("length", [1, 2, 100, 1000])
def test_the_sum_comes_back(length: int) -> None:
    agreed = grid(length=length, noise_multiplier=0.0, bits=30)
    diagonal = signs(agreed, seeded_stream(0, "rotation", length))
    updates = vectors(10, length, 0.9)
    total = np.zeros(agreed.padded, dtype=np.int64)
    for update in updates:
        sent = encode(update, agreed, diagonal, system_stream())
        assert sent.min() >= 0
        assert sent.max() < agreed.modulus
        total = (total + sent) % agreed.modulus
    found = decode(total, agreed, diagonal)
    np.testing.assert_allclose(
        found, updates.sum(0), atol=10 * agreed.step * math.sqrt(agreed.padded)
    )


def test_noise_in_the_sum_has_the_planned_std() -> None:
    agreed = grid(length=4096, noise_multiplier=0.8, survivors=10)
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    updates = vectors(10, 4096, 1.0)
    total = sum(encode(u, agreed, diagonal, system_stream()) for u in updates) % agreed.modulus
    error = decode(np.asarray(total), agreed, diagonal) - updates.sum(0)
    assert stats.kstest(error, "norm", args=(0, 0.8)).pvalue > 1e-6
    assert stats.kstest(error, "norm", args=(0, 0.8 * 2 / 3)).pvalue < 1e-30
    assert stats.kstest(error, "norm", args=(0, 0.8 * 3 / 2)).pvalue < 1e-30


def test_measured_influence_is_within_the_declared_norm() -> None:
    agreed = grid(length=50, noise_multiplier=0.0, bits=12)
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    spike = np.zeros(50)
    spike[3] = 1.0
    for vector in (spike, -spike, vectors(1, 50, 1.0)[0], np.zeros(50)):
        for _ in range(20):
            sent = encode(vector, agreed, diagonal, system_stream())
            half = agreed.modulus // 2
            centred = (sent + half) % agreed.modulus - half
            assert np.linalg.norm(centred) <= agreed.rounded_norm


def test_rounding_is_unbiased_enough_to_average_out() -> None:
    agreed = grid(length=8, noise_multiplier=0.0, bits=8, clients=10)
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    vector = vectors(1, 8, 0.8)[0]
    decoded = [
        decode(encode(vector, agreed, diagonal, system_stream()), agreed, diagonal)
        for _ in range(2000)
    ]
    assert np.abs(np.mean(decoded, 0) - vector).max() < 0.1 * agreed.step


def test_hadamard_is_orthonormal_and_its_own_inverse() -> None:
    vector = np.random.default_rng(1).normal(size=64)
    turned = hadamard(vector)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(vector))
    np.testing.assert_allclose(hadamard(turned), vector, atol=1e-12)
    np.testing.assert_allclose(hadamard(np.eye(2)[0]), [2**-0.5, 2**-0.5])


def test_a_spike_is_flattened() -> None:
    agreed = grid(length=1024, noise_multiplier=0.0)
    spike = np.zeros(1024)
    spike[17] = 1.0
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    assert np.abs(hadamard(spike * diagonal)).max() == pytest.approx(1 / 32)


def test_no_noise_is_no_privacy() -> None:
    assert rdp_epsilon({grid(noise_multiplier=0.0).mechanism(): 1}, 1e-5) == math.inf


def test_what_makes_no_sense_is_refused() -> None:
    agreed = grid()
    diagonal = signs(agreed, seeded_stream(0, "rotation"))
    for vector in (np.full(100, 1.0), np.zeros(99), np.full(100, math.nan)):
        with pytest.raises(InputError, match="clip it before"):
            encode(vector, agreed, diagonal, system_stream())
    for wrong in (
        {"length": 0},
        {"bits": 0},
        {"bits": 41},
        {"survivors": 11},
        {"survivors": 0},
        {"noise_multiplier": math.nan},
        {"clip_norm": 0.0},
        {"bits": 2, "clients": 100_000},
    ):
        with pytest.raises(InputError):
            grid(**wrong)
