"""numpy-app: A Flower / NumPy app."""

import numpy as np

TRUE = np.array([1.0, -2.0, 0.5, 3.0])


def load_data(partition_id: int):
    """A partition's linear regression problem."""
    rng = np.random.default_rng(partition_id)
    x = rng.normal(size=(40 + 10 * partition_id, 4))
    return x, x @ TRUE + 0.1 * rng.normal(size=len(x))
