"""Every client is in one chunk, chunks keep to their memory, and uneven clients apart."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from umbel.simulations.chunks import Footprint, chunks, memory_bound, spans


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    batch_size=st.one_of(st.none(), st.integers(1, 40)),
    memory=st.integers(1, 100_000),
    largest=st.one_of(st.none(), st.integers(1, 10)),
)
def test_a_deal(sizes, batch_size, memory, largest):
    footprint = Footprint(100, 4, 10)
    dealt = chunks(np.array(sizes), batch_size, footprint, memory, largest)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(sizes)))
    for chunk in dealt:
        held = [sizes[i] for i in chunk]
        widths = held if batch_size is None else [min(n, batch_size) for n in held]
        assert held == sorted(held, reverse=True)
        assert min(widths) * 2 >= max(widths)
        assert len(chunk) == 1 or footprint.client(max(widths)) * len(chunk) <= memory
        assert largest is None or len(chunk) <= largest


def test_equal_clients_keep_their_order_in_one_chunk():
    (chunk,) = chunks(np.full(5, 9), 4, Footprint(100, 4, 10), 1 << 20, None)
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
