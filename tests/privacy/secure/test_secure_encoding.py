"""Fixed point: error bound, no bias, exact counts, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core.errors import InputError
from umbel.privacy.secure_aggregation.encoding import Layout, Real, Whole
from umbel.privacy.secure_aggregation.refusals import Reason, Refused
from umbel.privacy.secure_aggregation.terms import Policy, Terms, widest_values
from umbel.privacy.secure_aggregation.words import pack_words, unpack_words


@given(
    clients=st.integers(1, 40),
    ring_bits=st.integers(16, 32),
    bound=st.floats(1e-6, 1e6),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_the_error_of_a_sum_is_bounded(clients, ring_bits, bound, dtype, seed):
    layout = Layout(
        [Real("delta", 50, bound), Whole("examples", 1, 0, 100)],
        min(31, widest_values(clients, ring_bits)),
    )
    rng = np.random.default_rng(seed)
    # Beyond the bound too: what is promised is the sum of the clipped numbers.
    values = (rng.normal(size=(clients, 50)) * bound).astype(dtype)
    values[0, :3] = [bound, -bound, 0]
    counts = rng.integers(0, 101, clients)
    total = np.zeros(51, dtype=np.uint32)
    for row, count in zip(values, counts, strict=True):
        total += layout.encode({"delta": row, "examples": count})
    total &= np.uint32((1 << ring_bits) - 1)
    sums = layout.decode(total, clients)
    exact = np.clip(values.astype(np.float64), -bound, bound).sum(axis=0)
    worst = np.abs(sums["delta"] - exact).max()
    assert worst <= layout.error_bound(layout.fields[0], clients) + 1e-12 * clients * bound
    assert sums["examples"][0] == counts.sum()


def test_rounding_is_unbiased_and_its_spread_as_stated():
    layout = Layout([Real("x", 40_000, 1.0)], 8)
    step = layout.step(layout.fields[0])
    value = 0.3 * step  # between two levels, at 0.8 of the way
    decoded = layout.decode(layout.encode({"x": np.full(40_000, value)}), 1)["x"]
    error = decoded - value
    assert abs(error.mean()) < 5 * step / 2 / 200
    assert error.std() <= step / 2 * 1.02
    assert len(np.unique(decoded)) == 2


def test_two_encodings_round_differently():
    layout = Layout([Real("x", 1000, 1.0)], 8)
    values = {"x": np.linspace(-0.9, 0.9, 1000)}
    assert (layout.encode(values) != layout.encode(values)).any()


@pytest.mark.parametrize("bits", [1, 16, 31])
def test_the_ends_of_the_range_are_exact(bits):
    layout = Layout([Real("x", 2, 3.5)], bits)
    for _ in range(20):
        words = layout.encode({"x": np.array([-3.5, 3.5])})
        assert words.tolist() == [0, layout.levels]
    assert layout.decode(words, 1)["x"] == pytest.approx([-3.5, 3.5], abs=1e-12)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x": [1.0, np.nan], "n": [1]}, "not finite"),
        ({"x": [1.0, np.inf], "n": [1]}, "not finite"),
        ({"x": [1.0], "n": [1]}, "1 numbers, expected 2"),
        ({"x": [1.0, 1.0]}, "expected"),
        ({"x": [1.0, 1.0], "n": [11]}, "from 0 to 10"),
        ({"x": [1.0, 1.0], "n": [-1]}, "from 0 to 10"),
        ({"x": [1.0, 1.0], "n": [0.5]}, "not whole"),
    ],
)
def test_bad_payloads_are_refused(values, words):
    layout = Layout([Real("x", 2, 1.0), Whole("n", 1, 0, 10)], 16)
    with pytest.raises(InputError, match=words):
        layout.encode({name: np.array(value) for name, value in values.items()})


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [Real("x", 0, 1.0)],
        [Real("x", 1, 0.0)],
        [Real("x", 1, 1.0), Real("x", 1, 1.0)],
        [Whole("n", 1, 0, 70_000)],
        [Whole("n", 1, 3, 2)],
    ],
)
def test_bad_layouts_are_refused(fields):
    with pytest.raises(InputError):
        Layout(fields, 16)


@given(n=st.integers(1, 5000), ring_bits=st.integers(16, 32))
def test_the_widest_values_just_fit_the_ring(n, ring_bits):
    bits = widest_values(n, ring_bits)
    assert n * (2**bits - 1) < 2**ring_bits <= n * (2 ** (bits + 1) - 1)


@given(ring_bits=st.integers(16, 32), size=st.integers(1, 200), seed=st.integers(0, 2**32))
@settings(deadline=None)
def test_words_travel_in_as_few_bytes_as_hold_them(ring_bits, size, seed):
    terms = Terms(b"r" * 16, 0, b"c" * 32, b"d" * 32, size, ring_bits, 1)
    words = np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)
    sent = pack_words(words.copy(), terms)
    assert len(sent) == size * -(-ring_bits // 8)
    assert np.array_equal(unpack_words(sent, terms), words & np.uint32(2**ring_bits - 1))
    for wrong in (sent[:-1], bytes(sent) + b"\0"):
        with pytest.raises(Refused):
            unpack_words(wrong, terms)


def test_a_word_outside_the_ring_is_refused():
    terms = Terms(b"r" * 16, 0, b"c" * 32, b"d" * 32, 1, 20, 1)
    with pytest.raises(Refused) as refused:
        unpack_words((1 << 20).to_bytes(3, "little"), terms)
    assert refused.value.reason is Reason.MALFORMED


@pytest.mark.parametrize(("ring_bits", "value_bits"), [(15, 8), (33, 8), (16, 17), (16, 0)])
def test_terms_out_of_bounds_are_refused(ring_bits, value_bits):
    with pytest.raises(InputError):
        Terms(b"r" * 16, 0, b"c" * 32, b"d" * 32, 1, ring_bits, value_bits)


@pytest.mark.parametrize("policy", [{"min_cohort": 1}, {"corrupt_fraction": 1.0}, {"sigma": 0}])
def test_policies_that_protect_nothing_are_refused(policy):
    with pytest.raises(InputError):
        Policy(**policy)
