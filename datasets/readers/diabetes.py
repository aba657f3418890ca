"""Diabetes progression, bundled with scikit-learn."""

from __future__ import annotations

from umbel.datasets.columns import standardised
from umbel.datasets.federated import Dataset, Info


def diabetes() -> Dataset:
    """442 patients, 10 features, regression of progression; standardised, from scikit-learn."""
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes()
    arrays = {"x": standardised(bunch.data), "y": standardised(bunch.target)}
    return Dataset(Info("diabetes", (10,)), arrays)
