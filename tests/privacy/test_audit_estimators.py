from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from umbel.core.errors import InputError
from umbel.privacy.accounting import epsilon
from umbel.privacy.audits import membership, one_run, one_shot
from umbel.privacy.audits.binomial import at_least, clopper_pearson, masses
from umbel.privacy.audits.images import psnr, ssim
from umbel.privacy.audits.one_shot import Normal, hockey_stick
from umbel.privacy.mechanisms import Gaussian

DELTA = 1e-5


@pytest.mark.parametrize(("n", "p"), [(0, 0.3), (1, 0.0), (7, 1.0), (50, 0.2), (2000, 0.73)])
def test_binomial_tails(n: int, p: float) -> None:
    np.testing.assert_allclose(masses(n, p), stats.binom.pmf(np.arange(n + 1), n, p), atol=1e-12)
    for k in range(0, n + 2, 7):
        assert at_least(k, n, p) == pytest.approx(stats.binom.sf(k - 1, n, p), abs=1e-10)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 10), (1, 1000), (900, 1000)])
def test_clopper_pearson(k: int, n: int) -> None:
    exact = stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert clopper_pearson(k, n) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_goldens_of_one_run() -> None:
    # All of 100 guesses right, pure DP, 95 %: q^100 <= 0.05, epsilon = log(q / (1 - q)).
    q = 0.05**0.01
    assert one_run.refuted(100, 100, 100, 0.0, 0.05) == pytest.approx(
        math.log(q / (1 - q)), abs=2e-4
    )
    # The formula of the paper's appendix D, summed here the long way.
    m, r, v, eps, delta = 1000, 60, 50, 1.2, 1e-4
    p = 1 / (1 + math.exp(-eps))
    pmf = stats.binom.pmf(np.arange(r + 1), r, p)
    alpha = max(pmf[v - i : v].sum() / i for i in range(1, v + 1))
    expected = stats.binom.sf(v - 1, r, p) + 2 * m * delta * alpha
    assert one_run.p_value(m, r, v, eps, delta) == pytest.approx(expected, rel=1e-9)


def test_one_run_rises_with_correct_guesses_and_falls_with_delta() -> None:
    bounds = [one_run.refuted(1000, 100, v, DELTA, 0.05) for v in (50, 70, 90, 100)]
    assert bounds[0] == 0
    assert bounds == sorted(bounds)
    assert one_run.refuted(1000, 100, 90, 1e-3, 0.05) < bounds[2]


def gaussian(mu: float, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(seed)
    included = drawn.random(m) < 0.5
    return included * mu + drawn.normal(size=m), included


@pytest.mark.parametrize("mu", [0.25, 0.5])
def test_one_run_accepts_the_mechanism_and_refutes_a_quarter_of_its_noise(mu: float) -> None:
    theory = epsilon({Gaussian(1 / mu): 1}, DELTA).epsilon
    for seed in range(10):
        assert one_run.audit(*gaussian(mu, 1000, seed), DELTA, 0.99).epsilon < theory
        assert one_run.audit(*gaussian(4 * mu, 1000, seed), DELTA, 0.99).epsilon > theory


def test_one_run_proves_nothing_of_noise() -> None:
    found = [one_run.audit(*gaussian(0.0, 500, seed), DELTA).epsilon for seed in range(100)]
    # At 95 % confidence at most 5 of 100 should be above 0; 15 would be one in 10^4.
    assert sum(eps > 0 for eps in found) < 15
    assert one_run.audit(*gaussian(50.0, 500, 0), DELTA).epsilon > 3


@pytest.mark.parametrize("scores", [np.zeros(0), np.full(3, np.nan)])
def test_one_run_needs_scores(scores: np.ndarray) -> None:
    with pytest.raises(InputError, match="one coin"):
        one_run.audit(scores, np.ones(len(scores), dtype=bool), DELTA)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 4.0])
def test_hockey_stick_of_equal_spread_is_the_gaussian_mechanism(mu: float) -> None:
    exact = epsilon({Gaussian(1 / mu): 1}, DELTA).epsilon
    for left, right in ((mu, 0.0), (0.0, mu), (3 * mu, 2 * mu)):
        assert hockey_stick(Normal(left, 1), Normal(right, 1), DELTA) == pytest.approx(
            exact, rel=1e-6
        )
    assert hockey_stick(Normal(7 * mu, 7), Normal(0, 7), DELTA) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("left", "right"), [(Normal(1, 1), Normal(0, 1.5)), (Normal(0.5, 1.4), Normal(0, 1))]
)
def test_hockey_stick_of_unequal_spread(left: Normal, right: Normal) -> None:
    found = hockey_stick(left, right, 1e-3)
    x = np.linspace(-30, 30, 2_000_001)
    gap = stats.norm.pdf(x, *left) - math.exp(found) * stats.norm.pdf(x, *right)
    assert np.trapezoid(np.maximum(gap, 0), x) == pytest.approx(1e-3, rel=1e-4)


def test_hockey_stick_at_the_ends() -> None:
    assert hockey_stick(Normal(1, 2), Normal(1, 2), DELTA) == 0
    assert hockey_stick(Normal(1, 0), Normal(0, 0), DELTA) == one_shot.MOST
    assert hockey_stick(Normal(1, 0), Normal(1, 0), DELTA) == 0


def test_one_shot_estimates_the_epsilon_of_random_directions() -> None:
    # 200 canaries in 20,000 dimensions, summed with noise of std 1 / mu: Algorithm 2 as it stands.
    drawn, d, mu = np.random.default_rng(0), 20_000, 2.0
    canaries = drawn.normal(size=(200, d))
    canaries /= np.linalg.norm(canaries, axis=1, keepdims=True)
    total = canaries.sum(0) + drawn.normal(size=d) / mu
    cosines = canaries @ total / np.linalg.norm(total)
    found = one_shot.estimate(cosines, None, d, DELTA)
    exact = epsilon({Gaussian(1 / mu): 1}, DELTA).epsilon
    assert found.absent == Normal(0, d**-0.5)
    assert found.epsilon == pytest.approx(exact, rel=0.25)
    fresh = drawn.normal(size=(500, d))
    absent = fresh @ total / np.linalg.norm(total) / np.linalg.norm(fresh, axis=1)
    pooled = one_shot.estimate(cosines, absent, d, DELTA, pooled=True)
    assert pooled.present.std == pooled.absent.std
    assert pooled.epsilon == pytest.approx(exact, rel=0.25)
    with pytest.raises(InputError, match="fewer than two"):
        one_shot.estimate(cosines[:1], None, d, DELTA)


def test_roc_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.8, 0.3, 0.1])
    curve = membership.roc(scores, np.array([True, True, False, False, True]))
    assert curve.false.tolist() == [0, 0, 1, 2, 2]
    assert curve.true.tolist() == [0, 1, 2, 2, 3]
    assert curve.auc == pytest.approx(3.5 / 6)
    point = membership.true_rate(curve, 0.0)
    assert (point.rate, point.low, point.high) == (1 / 3, *clopper_pearson(1, 3))
    assert membership.true_rate(curve, 0.5).rate == pytest.approx(2 / 3)


def test_auc_is_that_of_pairs() -> None:
    drawn = np.random.default_rng(1)
    members = drawn.random(400) < 0.4
    scores = np.round(members * 0.7 + drawn.normal(size=400), 1)  # with ties
    pairs = scores[members][:, None] - scores[~members]
    exact = float(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    assert membership.roc(scores, members).auc == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_bound_of_a_curve_is_below_the_truth(mu: float) -> None:
    theory = epsilon({Gaussian(1 / mu): 1}, DELTA).epsilon if mu else 0.0
    for seed in range(5):
        scores, members = gaussian(mu, 4000, seed)
        assert membership.bound(membership.roc(scores, members), DELTA) <= theory + 1e-12
    scores, members = gaussian(6.0, 4000, 0)
    assert membership.bound(membership.roc(scores, members), DELTA) > 4


def test_rmia_finds_members_where_the_loss_cannot() -> None:
    # Examples of very different difficulty; a member's probability rises a little.
    drawn, n, models = np.random.default_rng(2), 2000, 8
    hard = drawn.uniform(-4, 4, size=n)
    inside = drawn.random((models, n)) < 0.5
    confidence = 1 / (1 + np.exp(-(hard + 1.0 * inside + 0.3 * drawn.normal(size=(models, n)))))
    hard_z = drawn.uniform(-4, 4, size=500)
    z = 1 / (1 + np.exp(-(hard_z + 0.3 * drawn.normal(size=(models, 500)))))
    scores = membership.rmia(confidence[0], confidence[1:], z[0], z[1:])
    attack = membership.roc(scores, inside[0])
    threshold = membership.roc(confidence[0], inside[0])
    assert attack.auc > threshold.auc + 0.1
    assert membership.true_rate(attack, 0.01).low > membership.true_rate(threshold, 0.01).high


def test_membership_needs_both_kinds() -> None:
    for wrong in (np.ones(3, dtype=bool), np.zeros(3, dtype=bool)):
        with pytest.raises(InputError, match="members"):
            membership.roc(np.arange(3.0), wrong)


def test_psnr_and_ssim_of_known_pictures() -> None:
    picture = np.random.default_rng(0).random((1, 28, 28))
    assert psnr(picture, picture) == math.inf
    assert psnr(np.zeros((1, 8, 8)), np.full((1, 8, 8), 0.1)) == pytest.approx(20.0)
    assert ssim(picture, picture) == pytest.approx(1.0)
    # Flat pictures: the luminance term alone.
    a, b = 0.3, 0.7
    flat = ssim(np.full((1, 16, 16), a), np.full((1, 16, 16), b))
    assert flat == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4))
    assert ssim(picture, 1 - picture) < 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 17)])
def test_ssim_window_by_window(shape: tuple[int, ...]) -> None:
    drawn = np.random.default_rng(1)
    x, y = drawn.random(shape), drawn.random(shape)
    side = min(11, shape[1] - 1 + shape[1] % 2)
    at = np.arange(side) - side // 2
    window = np.exp(-(at[:, None] ** 2 + at**2) / 4.5)
    window /= window.sum()
    found = []
    for c in range(shape[0]):
        for i in range(shape[1] - side + 1):
            for j in range(shape[2] - side + 1):
                p, q = x[c, i : i + side, j : j + side], y[c, i : i + side, j : j + side]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                found.append(
                    (2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )  # fmt: skip
    assert ssim(x, y) == pytest.approx(float(np.mean(found)), rel=1e-9)
