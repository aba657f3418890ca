from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.accounting import epsilon
from umbel.privacy.calibration import noise_multiplier, releases
from umbel.privacy.mechanisms import EVERYONE, Gaussian, batches


def test_golden() -> None:
    # dp-accounting 0.6.0: PLD of q 1/16, T 1600, delta 1e-5 is 3.0005 at 3.582, 2.9995 at 3.583.
    z = noise_multiplier(3.0, 1e-5, 1600, batches(1 / 16))
    assert z == pytest.approx(3.582, abs=6e-4)
    assert epsilon({Gaussian(z, batches(1 / 16)): 1600}, 1e-5).epsilon <= 3.0
    assert epsilon({Gaussian(z * 0.9999, batches(1 / 16)): 1600}, 1e-5).epsilon > 3.0


# dp-accounting 0.6.0, PLD in its default settings, gives the target at these multipliers.
@pytest.mark.parametrize(
    ("target", "steps", "rate", "truth"),
    [(0.1, 1_000, 0.01, 9.804), (50.0, 10, 1.0, 0.4736)],
)
def test_goldens_of_small_and_large_targets(
    target: float, steps: int, rate: float, truth: float
) -> None:
    sampling = EVERYONE if rate == 1 else batches(rate)
    assert noise_multiplier(target, 1e-5, steps, sampling) == pytest.approx(truth, rel=3e-4)


# From 0.1, no case needs more noise than the 10,000 that is looked for.
@settings(max_examples=20)
@given(st.floats(0.1, 100), st.integers(1, 10_000), st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_the_target_is_met_and_not_by_more_than_a_hair(
    target: float, steps: int, delta: float
) -> None:
    z = noise_multiplier(target, delta, steps)
    found = epsilon({Gaussian(z): steps}, delta).epsilon
    assert found <= target
    assert epsilon({Gaussian(z * (1 - 3e-5)): steps}, delta).epsilon > target


@pytest.mark.parametrize("target", [0.1, 2.0])
def test_rdp_asks_for_more(target: float) -> None:
    fast = noise_multiplier(target, 1e-5, 200, batches(0.05), accountant="rdp")
    tight = noise_multiplier(target, 1e-5, 200, batches(0.05))
    assert tight < fast < 1.25 * tight
    assert epsilon({Gaussian(fast, batches(0.05)): 200}, 1e-5, "rdp").epsilon <= target


def test_what_was_spent_before_counts() -> None:
    before = {Gaussian(20.0): 30}
    z = noise_multiplier(2.0, 1e-5, 50, spent=before)
    assert epsilon({**before, Gaussian(z): 50}, 1e-5).epsilon <= 2.0
    assert z > noise_multiplier(2.0, 1e-5, 50)
    with pytest.raises(InputError, match="was spent before"):
        noise_multiplier(0.5, 1e-5, 50, spent=before)


def test_replace_one_needs_twice_the_noise() -> None:
    once = noise_multiplier(1.0, 1e-5, 10)
    assert noise_multiplier(1.0, 1e-5, 10, relation="replace-one") == pytest.approx(2 * once, 1e-4)


def test_a_budget_that_nothing_can_pass_needs_the_least_noise() -> None:
    assert noise_multiplier(1e9, 1e-5, 1) == 0.001


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, "not a positive number"),
        ({"target": -1.0}, "not a positive number"),
        ({"target": math.inf}, "not a positive number"),
        ({"target": math.nan}, "not a positive number"),
        ({"steps": 0}, "0 steps"),
        ({"delta": 0.0}, "not between 0 and 1"),
        ({"target": 1e-7}, "above 10000"),
    ],
)
def test_impossible_targets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        noise_multiplier(**{"target": 1.0, "delta": 1e-5, "steps": 10, **arguments})
    assert caught.value.fix


@pytest.mark.parametrize("mechanism", [Gaussian(20.0), Gaussian(3.0, batches(1 / 16))])
def test_releases_are_the_last_that_fit(mechanism: Gaussian) -> None:
    last = releases(mechanism, 3.0, 1e-5)
    assert epsilon({mechanism: last}, 1e-5).epsilon <= 3.0 < epsilon({mechanism: last + 1}, 1e-5)[0]
    assert releases(mechanism, 3.0, 1e-5, most=last - 1) == last - 1


def test_releases_may_be_none() -> None:
    assert releases(Gaussian(0.5, EVERYONE), 3.0, 1e-5) == 0
