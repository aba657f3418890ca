"""Every split deals each row to exactly one client, by seed alone, and says what it cannot do."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.core import registry
from umbel.core.errors import InputError
from umbel.datasets.deal import TOGETHER, Deal, by_client, in_turn
from umbel.datasets.federated import Holdings

BY_COUNT = ["iid", "shards", "dirichlet", "quantity", "feature-shift"]


def split(kind: str, deal: Deal, **keys: Any) -> Holdings:
    holdings: Holdings = registry.find("splits", kind, "[data.split]")(deal, **keys)
    return holdings


def made(rows: int, classes: int, seed: int = 0, owners: int | None = None) -> Deal:
    draws = np.random.default_rng(seed)
    owner = None if owners is None else draws.integers(owners, size=rows).astype(str)
    x = draws.normal(size=(rows, 3)).astype(np.float32)
    return Deal(x, draws.integers(classes, size=rows), owner, seed)


def same(a: Holdings, b: Holdings) -> bool:
    return np.array_equal(a.offsets, b.offsets) and np.array_equal(a.index, b.index)


def is_partition(holdings: Holdings, rows: int) -> bool:
    return np.array_equal(np.sort(holdings.index), np.arange(rows))


@settings(deadline=None)
@given(
    kind=st.sampled_from(BY_COUNT),
    rows=st.integers(40, 400),
    classes=st.integers(1, 12),
    clients=st.integers(1, 20),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_is_a_partition_by_seed_alone(
    kind: str, rows: int, classes: int, clients: int, seed: int
) -> None:
    deal = Deal(*(getattr(made(rows, classes), f) for f in ("x", "labels", "owner")), seed=seed)
    keys = {"minimum": 0} if kind == "dirichlet" else {}
    first = split(kind, deal, clients=clients, **keys)
    assert len(first) == clients
    assert is_partition(first, rows)
    np.random.seed(1)  # noqa: NPY002  a global generator must not matter
    assert same(first, split(kind, deal, clients=clients, **keys))


@pytest.mark.parametrize("clients", [1, TOGETHER, TOGETHER + 1, 3 * TOGETHER])
def test_rows_dealt_in_turn_are_those_of_each_client_in_their_order(clients: int) -> None:
    draws = np.random.default_rng(clients)
    sizes = draws.integers(0, 5, clients)
    order = draws.permutation(int(sizes.sum()))
    client = np.empty(len(order), np.int64)
    client[order] = np.repeat(np.arange(clients), sizes)
    assert same(in_turn(order, sizes), by_client(client, clients))


@settings(deadline=None)
@given(rows=st.integers(1, 200), owners=st.integers(1, 30), seed=st.integers(0, 9))
def test_natural_gives_each_owner_its_rows(rows: int, owners: int, seed: int) -> None:
    deal = made(rows, 3, seed, owners)
    assert deal.owner is not None
    holdings = split("natural", deal)
    assert is_partition(holdings, rows)
    for place, name in enumerate(sorted(set(deal.owner.tolist()))):
        np.testing.assert_array_equal(holdings.of_client(place), np.flatnonzero(deal.owner == name))


@pytest.mark.parametrize("kind", BY_COUNT)
def test_another_seed_deals_otherwise(kind: str) -> None:
    deal = made(500, 5)
    other = Deal(deal.x, deal.labels, None, deal.seed + 1)
    assert not same(split(kind, deal, clients=10), split(kind, other, clients=10))


@pytest.mark.parametrize("kind", ["iid", "feature-shift"])
@pytest.mark.parametrize("clients", [1, 7, 500])
def test_even_splits_are_even(kind: str, clients: int) -> None:
    sizes = split(kind, made(500, 5), clients=clients).sizes()
    assert sizes.max() - sizes.min() <= 1


def test_shards_show_few_classes() -> None:
    deal = Deal(np.zeros((1000, 1)), np.arange(1000) % 10, None, 3)
    holdings = split("shards", deal, clients=50)
    assert set(holdings.sizes()) == {20}
    seen = [len(set(deal.labels[holdings.of_client(c)])) for c in range(50)]
    assert max(seen) == 2  # classes fill whole shards here


def test_alpha_moves_dirichlet_from_skewed_to_even() -> None:
    deal = made(5000, 5)
    largest = []
    for alpha in (0.05, 0.5, 1000.0):
        holdings = split("dirichlet", deal, clients=10, alpha=alpha)
        table = np.array(
            [np.bincount(deal.labels[holdings.of_client(c)], minlength=5) for c in range(10)]
        )
        largest.append(float((table / table.sum(0)).max(0).mean()))
    assert largest[0] > 0.6
    assert largest[0] > largest[1] > largest[2]
    assert largest[2] < 0.12  # an even division gives each client 0.1 of a class


@pytest.mark.parametrize("alpha", [1e-300, 1e-6, 1e6])
def test_extreme_concentrations(alpha: float) -> None:
    for kind in ("dirichlet", "quantity"):
        holdings = split(kind, made(300, 4), clients=5, alpha=alpha, minimum=0)
        assert is_partition(holdings, 300)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_the_minimum_is_kept(kind: str) -> None:
    assert split(kind, made(1000, 10), clients=20, alpha=0.3, minimum=10).sizes().min() >= 10


def test_quantity_is_skewed_and_keeps_the_mix() -> None:
    deal = made(20000, 2)
    holdings = split("quantity", deal, clients=10, alpha=0.5)
    sizes = holdings.sizes()
    assert sizes.max() > 5 * np.median(sizes)
    large = deal.labels[holdings.of_client(int(sizes.argmax()))]
    assert large.mean() == pytest.approx(deal.labels.mean(), abs=0.03)


def test_feature_shift_parts_the_inputs() -> None:
    deal = made(2000, 2)
    holdings = split("feature-shift", deal, clients=4)
    means = np.array([deal.x[holdings.of_client(c)].mean(0) for c in range(4)])
    assert np.linalg.norm(means[0] - means[3]) > 1.5  # in deviations; near 0.1 for an even deal


def test_impossible_splits_say_what_would_work() -> None:
    with pytest.raises(InputError, match=r"minimum = 95 cannot be met.*smallest") as never:
        split("dirichlet", made(1000, 10), clients=10, alpha=0.1, minimum=95)
    assert "minimum ≤" in never.value.fix
    with pytest.raises(InputError, match="need 2000 examples; there are 1000") as many:
        split("dirichlet", made(1000, 10), clients=10, minimum=200)
    assert "clients ≤ 5" in many.value.fix
    for kind in BY_COUNT:
        with pytest.raises(InputError, match="there are 100 training examples"):
            split(kind, made(100, 2), clients=101)
    with pytest.raises(InputError, match="names the owner"):
        split("natural", made(100, 2))
    with pytest.raises(InputError, match="leaves none of 3 clients"):
        split("natural", made(90, 2, owners=3), minimum=80)


def test_natural_leaves_small_owners_out() -> None:
    deal = Deal(np.zeros((6, 1)), np.zeros(6, int), np.array(["b", "a", "b", "c", "c", "b"]), 0)
    holdings = split("natural", deal, minimum=2)
    assert [holdings.of_client(c).tolist() for c in range(2)] == [[0, 2, 5], [3, 4]]


def test_a_million_clients_cost_arrays_and_not_objects() -> None:
    count = 1_000_000
    deal = Deal(np.zeros((count, 1), np.float32), np.arange(count) % 10, None, 0)
    tracemalloc.start()
    holdings = split("iid", deal, clients=count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert is_partition(holdings, count)
    assert holdings.sizes().max() == 1
    # One Python object a client would take more than 100 bytes each by itself.
    assert peak < 80 * count
    kept = holdings.offsets.nbytes + holdings.index.nbytes
    assert kept < 13 * count
