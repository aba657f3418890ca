"""The graph: regular, the same from all sides, and chosen by nobody."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest

from umbel.privacy.secure_aggregation import graph
from umbel.privacy.secure_aggregation.parameters import MAX_DRAWS, is_regular


@pytest.mark.parametrize("n", [3, 4, 7, 10, 33])
def test_every_degree_gives_a_regular_symmetric_graph(n):
    for k in range(1, n):
        if not is_regular(n, k):
            continue
        order = graph.ring(os.urandom(32), n)
        table = graph.neighbours_on(order, k)
        for me, row in enumerate(table):
            assert len(set(row)) == k
            assert me not in row
            assert list(row) == sorted(row)
            assert all(me in table[them] for them in row)
            assert graph.neighbours_of(order, k, me) == row


def test_neighbours_are_a_uniform_subset():
    n, k, draws = 12, 4, 3000
    met = Counter()
    for i in range(draws):
        order = graph.ring(i.to_bytes(32, "big"), n)
        met.update(graph.neighbours_of(order, k, 0))
    expected = draws * k / (n - 1)
    chi2 = sum((met[them] - expected) ** 2 / expected for them in range(1, n))
    assert chi2 < 31  # 10 degrees of freedom, p < 0.001; the seeds are fixed


def test_one_honest_secret_changes_the_whole_graph():
    n = 64
    nonces = [os.urandom(32) for _ in range(n)]
    seed = graph.seed_of(bytes(32), b"".join(nonces))
    nonces[17] = os.urandom(32)
    other = graph.seed_of(bytes(32), b"".join(nonces))
    assert seed != other
    assert (graph.ring(seed, n) == graph.ring(other, n)).mean() < 0.2
    assert seed != graph.seed_of(b"x" * 32, b"".join(nonces))


def test_a_chain_opens_to_what_it_promised_and_shows_no_later_link():
    chain = graph.Chain()
    links = [chain.open(draw) for draw in range(MAX_DRAWS)]
    for draw, link in enumerate(links):
        assert graph.opens(chain.commitment, draw, link)
        assert not graph.opens(chain.commitment, draw, os.urandom(32))
        for other in range(MAX_DRAWS):
            assert other == draw or not graph.opens(chain.commitment, other, link)
    assert len(set(links)) == MAX_DRAWS


def test_the_complete_graph_is_a_harary_graph_too():
    order = np.arange(6)
    assert graph.neighbours_on(order, 5)[2] == (0, 1, 3, 4, 5)
