from __future__ import annotations

import collections

import pytest

from umbel.core.errors import InputError
from umbel.core.run_file import Strategy
from umbel.datasets.federated import Numbered
from umbel.server.sampling import cohort_size, sample

CLIENTS = Numbered(20)


def section(**table: object) -> Strategy:
    return Strategy.model_validate({"name": "fedavg", **table})


def test_a_cohort_is_a_function_of_seed_and_round() -> None:
    settings = section(cohort=5)
    assert sample(CLIENTS, settings, 1, 1) == sample(CLIENTS, settings, 1, 1)
    assert sample(CLIENTS, settings, 1, 1) != sample(CLIENTS, settings, 1, 2)
    assert sample(CLIENTS, settings, 1, 1) != sample(CLIENTS, settings, 2, 1)


@pytest.mark.parametrize(("cohort", "size"), [(None, 20), (7, 7), (0.25, 5), (0.001, 1), (1.0, 20)])
def test_cohort_by_count_and_by_share(cohort: float | None, size: int) -> None:
    names = sample(CLIENTS, section(cohort=cohort), 0, 1)
    assert len(set(names)) == len(names) == size
    assert names == sorted(names)


def test_every_client_is_as_likely() -> None:
    for cohort in (3, 15):  # both ways of drawing
        seen = collections.Counter(
            name for r in range(2000) for name in sample(CLIENTS, section(cohort=cohort), 0, r)
        )
        expected = 2000 * cohort / 20
        # Six standard deviations of a binomial: a fair draw fails once in 10**8.
        allowed = 6 * (expected * (1 - cohort / 20)) ** 0.5
        assert all(abs(seen[name] - expected) < allowed for name in CLIENTS)


def test_reserves_follow_the_cohort() -> None:
    plain = sample(CLIENTS, section(cohort=6), 3, 1)
    more = sample(CLIENTS, section(cohort=6, over_selection=0.5), 3, 1)
    assert more[:6] == plain
    assert len(set(more)) == 9
    assert len(sample(CLIENTS, section(cohort=18, over_selection=0.5), 3, 1)) == 20


def test_a_million_clients_cost_no_more_than_the_cohort() -> None:
    names = sample(Numbered(1_000_000), section(cohort=100), 0, 1)
    assert len(set(names)) == 100
    assert names == sorted(names)


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="cohort = 21 is more than the 20 clients"):
        cohort_size(section(cohort=21), 20)
    with pytest.raises(InputError, match="quorum = 6 is more than the cohort of 5"):
        cohort_size(section(cohort=5, quorum=6), 20)
