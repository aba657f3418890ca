"""Digits, bundled with scikit-learn."""

from __future__ import annotations

import numpy as np

from umbel.datasets.federated import Dataset, Info


def digits() -> Dataset:
    """1,797 handwritten digits of 8×8 pixels, 10 classes; bundled with scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = (bunch.images[:, None] / 16).astype(np.float32)
    info = Info("digits", (1, 8, 8), classes=10)
    return Dataset(info, {"x": x, "y": bunch.target.astype(np.int64)})
