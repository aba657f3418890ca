"""Every client is in one chunk, chunks keep to their memory, and uneven clients apart."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from umbel.client.batches import schedules
from umbel.simulations.chunks import (
    PADDING,
    Footprint,
    Length,
    chunks,
    memory_bound,
    spans,
)


def computed(sizes, length):
    """Examples that are really there, those that are computed, and whether none is padding."""
    padded = schedules(0, 1, [f"c{i}" for i in range(len(sizes))], np.array(sizes), *length)
    active, widths = (padded.counts > 0).sum(1), padded.counts.max(1)
    return int(padded.counts.sum()), int((active * widths).sum())


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    length=st.builds(
        lambda size, epochs, steps: Length(size, epochs if steps is None else None, steps),
        st.one_of(st.just("full"), st.integers(1, 20)),
        st.integers(1, 3),
        st.one_of(st.none(), st.integers(1, 7)),
    ),
    memory=st.integers(1, 100_000),
    largest=st.one_of(st.none(), st.integers(1, 10)),
    even=st.booleans(),
)
def test_a_deal(sizes, length, memory, largest, even):
    footprint = Footprint(100, 4, 10)
    dealt = chunks(np.array(sizes), length, footprint, memory, largest, even)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))
    for chunk in dealt:
        held = [sizes[i] for i in chunk]
        assert held == sorted(held, reverse=True)
        width = held[0] if length.batch_size == "full" else min(held[0], length.batch_size)
        assert len(chunk) == 1 or footprint.client(width) * len(chunk) <= memory
        assert largest is None or len(chunk) <= largest
        real, all_of_them = computed(held, length)
        assert real <= all_of_them <= (1 if even else PADDING) * real


def test_padding_of_a_long_tailed_federation_is_bounded_and_chunks_stay_large():
    sizes = np.random.default_rng(0).lognormal(3, 1, 400).astype(np.int64) + 1
    for length, least in [(Length(10, 2, None), 10), (Length("full", 1, None), 10)]:
        dealt = chunks(sizes, length, Footprint(100, 4, 10), 1 << 30, None)
        amounts = [computed(sizes[chunk], length) for chunk in dealt]
        real, padded = (sum(column) for column in zip(*amounts, strict=True))
        assert real < padded <= PADDING * real
        assert len(sizes) / len(dealt) > least


def test_clients_without_a_short_batch_go_together_where_nothing_may_be_padded():
    sizes = np.array([20, 7, 30, 17, 10, 27, 17])
    dealt = chunks(sizes, Length(10, 2, None), Footprint(100, 4, 10), 1 << 20, None, even=True)
    assert [chunk.tolist() for chunk in dealt] == [[2, 0, 4], [5], [3, 6], [1]]


def test_equal_clients_keep_their_order_in_one_chunk():
    length = Length(4, 1, None)
    (chunk,) = chunks(np.full(5, 9), length, Footprint(100, 4, 10), 1 << 20, None)
    assert chunk.tolist() == [0, 1, 2, 3, 4]


def test_spans_cover_the_cohort_in_order():
    cut = spans(7, Footprint(100, 4, 10), 350)
    assert [list(range(7))[s] for s in cut] == [[0, 1, 2], [3, 4, 5], [6]]
    assert spans(2, Footprint(100, 4, 10), 1) == [slice(0, 1), slice(1, 2)]


def test_the_bound_does_not_depend_on_what_is_free():
    cpu = torch.device("cpu")
    before = memory_bound(cpu)
    held = torch.ones(1 << 24)
    assert memory_bound(cpu) == before > held.nbytes
