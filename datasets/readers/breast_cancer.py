"""Breast cancer Wisconsin, bundled with scikit-learn."""

from __future__ import annotations

import numpy as np

from umbel.datasets.columns import standardised
from umbel.datasets.federated import Dataset, Info


def breast_cancer() -> Dataset:
    """569 tumours, 30 standardised features, 2 classes; bundled with scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    info = Info("breast-cancer", (30,), classes=2)
    return Dataset(info, {"x": standardised(bunch.data), "y": bunch.target.astype(np.int64)})
