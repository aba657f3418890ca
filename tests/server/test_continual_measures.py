"""The figures of an accuracy matrix, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from umbel.core.trees import Model
from umbel.server.continual import by_experience, matrix, measures, name
from umbel.server.records import Scores
from umbel.tasks.experiences import hits, share

R = np.array([[0.9, 0.2, 0.1], [0.95, 0.8, 0.3], [0.5, 0.6, 0.7]])


def test_the_figures_of_a_matrix() -> None:
    found = measures(R, before=[0.1, 0.1, 0.2], joint=[1.0, 0.9, 0.9])
    assert found["acc"] == pytest.approx((0.5 + 0.6 + 0.7) / 3)
    assert found["bwt"] == pytest.approx((0.5 - 0.9 + 0.6 - 0.8) / 2)
    assert found["forgetting"] == pytest.approx((0.95 - 0.5 + 0.8 - 0.6) / 2)
    assert found["fwt"] == pytest.approx((0.2 - 0.1 + 0.3 - 0.2) / 2)
    assert found["intransigence"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)


def test_the_first_stage_has_an_accuracy_only() -> None:
    assert measures(R[:1]) == {"acc": 0.9}


def test_experiences_without_test_examples_do_not_count() -> None:
    r = R.copy()
    r[:, 1] = math.nan
    assert measures(r)["acc"] == pytest.approx(0.6)
    assert measures(r)["forgetting"] == pytest.approx(0.45)


def test_accuracies_are_those_of_each_experiences_examples() -> None:
    means = {"loss": 1.0, "accuracy": 0.5, share(0): 0.25, hits(0): 0.2, share(1): 0.75}
    means |= {hits(1): 0.3, share(2): 0.0, hits(2): 0.0}
    scores = by_experience(lambda n, m: Scores(means, {"a": means}), 3, None)(1, Model({}, {}))
    wanted = {"loss": 1.0, "accuracy": 0.5, name(0): 0.8, name(1): pytest.approx(0.4)}
    assert scores.metrics == wanted
    assert scores.per_client == {"a": wanted}
    r = matrix([scores.metrics], 3)
    assert np.isnan(r[0, 2])
    assert r[0, 0] == 0.8
