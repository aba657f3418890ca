"""A small part of the Byzantine grid; `umbel bench byzantine` is all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from umbel.datasets.deal import Deal
from umbel.datasets.splits.gamma_similarity import gamma_similarity
from umbel.simulations.benchmarks.byzantine import accuracy


@pytest.mark.slow
@pytest.mark.data
def test_three_hostile_clients_of_thirteen_do_not_keep_mnist_from_being_learned(
    data_root: Path, tmp_path: Path
) -> None:
    assert accuracy(data_root, str(tmp_path), 0.66, 3, "sign flip", rounds=25) > 0.85


@pytest.mark.parametrize("gamma", [0.0, 0.33, 1.0])
def test_gamma_is_the_share_that_is_dealt_at_random(gamma: float) -> None:
    labels = np.repeat(np.arange(10), 100)
    deal = Deal(np.zeros((1000, 1)), labels, None, seed=2)
    held = gamma_similarity(deal, clients=10, gamma=gamma)
    assert sorted(held.index.tolist()) == list(range(1000))
    assert set(held.sizes().tolist()) <= {99, 100, 101}
    classes = [np.bincount(labels[held.of_client(k)], minlength=10) for k in range(10)]
    # The sorted part gives client k the class k, nearly whole.
    own = np.mean([count[k] for k, count in enumerate(classes)])
    assert own == pytest.approx(100 * (1 - gamma) + 10 * gamma, abs=15)
