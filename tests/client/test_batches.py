"""The batches of a cohort, dealt at once, are those of the obvious twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.client.batches import schedule, schedules, steps_of


@given(
    sizes=st.one_of(
        st.lists(st.integers(1, 23), min_size=1, max_size=7),
        st.tuples(st.integers(1, 7), st.integers(1, 23)).map(lambda many: many[0] * [many[1]]),
    ),
    batch_size=st.one_of(st.just("full"), st.integers(1, 9)),
    length=st.one_of(
        st.tuples(st.integers(1, 4), st.none()), st.tuples(st.none(), st.integers(1, 11))
    ),
    round_number=st.integers(1, 5),
)
def test_a_cohort_at_once_equals_one_by_one(sizes, batch_size, length, round_number):
    names = [f"c{i}" for i in range(len(sizes))]
    padded = schedules(7, round_number, names, np.array(sizes), batch_size, *length)
    for i, (name, n) in enumerate(zip(names, sizes, strict=True)):
        plain = schedule(7, round_number, name, n, batch_size, *length)
        assert len(plain) == (padded.counts[:, i] > 0).sum() == steps_of(n, batch_size, *length)
        for step, batch in enumerate(plain):
            count = padded.counts[step, i]
            np.testing.assert_array_equal(padded.rows[step, i, :count], batch)
            assert (padded.rows[step, i, count:] == batch[0]).all()
        assert not padded.rows[len(plain) :, i].any()


@pytest.mark.parametrize(("n", "size"), [(10, 4), (9, 3), (3, 10)])
def test_each_epoch_is_a_permutation_in_another_order(n, size):
    batches = schedule(0, 1, "c0", n, size, 3, None)
    per_epoch = -(-n // size)
    epochs = [np.concatenate(batches[i * per_epoch : (i + 1) * per_epoch]) for i in range(3)]
    assert [sorted(e) for e in epochs] == [list(range(n))] * 3
    assert len({tuple(e) for e in epochs}) > 1


def test_steps_continue_over_epochs():
    stream = schedule(0, 1, "c0", 5, 2, None, 7)
    epochs = schedule(0, 1, "c0", 5, 2, 3, None)
    assert [len(b) for b in stream] == [2, 2, 1, 2, 2, 1, 2]
    for a, b in zip(stream, epochs, strict=False):
        np.testing.assert_array_equal(a, b)


def test_orders_differ_by_seed_round_and_client():
    def order(*place):
        return tuple(np.concatenate(schedule(*place, 40, 8, 1, None)))

    assert len({order(*p) for p in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b")]}) == 4
