"""k and t: against exact tail sums, and refused where they cannot be had."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation.parameters import (
    MAX_DRAWS,
    choose,
    corrupt_bound,
    count_of,
    is_regular,
    largest_hit,
    safe_threshold,
)


def tail(others: int, marked: int, k: int, x: int) -> Fraction:
    """P[X > x], summed term by term."""
    hits = range(x + 1, min(marked, k) + 1)
    above = sum(comb(marked, i) * comb(others - marked, k - i) for i in hits)
    return Fraction(above, comb(others, k))


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_the_bound_is_the_least_one(data):
    others = data.draw(st.integers(1, 120))
    marked = data.draw(st.integers(0, others))
    k = data.draw(st.integers(1, others))
    events = data.draw(st.integers(1, 500))
    sigma = data.draw(st.sampled_from([3, 20, 40]))
    x = largest_hit(others, marked, k, events, sigma)
    limit = Fraction(1, 2**sigma)
    assert events * tail(others, marked, k, x) <= limit
    assert x == 0 or events * tail(others, marked, k, x - 1) > limit


@pytest.mark.parametrize(
    ("n", "gamma", "delta"),
    [
        (5, 0.0, 0.2),
        (10, 0.1, 0.2),
        (50, 0.2, 0.2),
        (100, 0.1, 0.2),
        (200, 0.1, 0.1),
        (1000, 0.05, 0.05),
    ],
)
def test_a_design_keeps_both_promises(n, gamma, delta):
    design = choose(n, gamma, delta)
    k, t, x = design
    assert is_regular(n, k)
    assert 2 * t > k + x
    corrupt, lost = count_of(gamma, n), count_of(delta, n)
    assert n * MAX_DRAWS * tail(n - 1, corrupt, k, x) <= Fraction(1, 2**40)
    assert n * tail(n - 1, lost, k, k - t) <= Fraction(1, 2**40)
    assert design.hidden_among == t - x + 1 >= 3


def test_small_cohorts_are_complete_and_large_ones_sparse():
    assert choose(20, 0.1, 0.1).neighbours == 19
    assert choose(1000, 0.05, 0.05).neighbours < 80


def test_fewer_neighbours_would_not_do():
    n, gamma, delta = 200, 0.1, 0.1
    k = choose(n, gamma, delta).neighbours
    for fewer in range(2, k):
        if is_regular(n, fewer):
            t = safe_threshold(fewer, corrupt_bound(n, fewer, gamma))
            lost = largest_hit(n - 1, count_of(delta, n), fewer, n)
            assert t > fewer - lost


def test_the_minimum_cohort_holds_for_every_sum():
    assert choose(10, 0.0, 0.0, min_cohort=9).threshold == 8


@pytest.mark.parametrize(
    ("n", "gamma", "delta", "words"),
    [
        (2, 0.0, 0.0, "cannot hide"),
        (10, 0.4, 0.4, "no graph on 10"),
        (3, 0.0, 0.5, "no graph on 3"),
        (10, 1.0, 0.0, "corrupt fraction is 1.0"),
        (10, 0.0, -0.1, "drop-out fraction is -0.1"),
    ],
)
def test_impossible_demands_are_refused(n, gamma, delta, words):
    with pytest.raises(InputError, match=words):
        choose(n, gamma, delta)


def test_decimal_fractions_count_as_they_read():
    assert [count_of(f, 100) for f in (0.07, 0.29, 0.57)] == [7, 29, 57]
