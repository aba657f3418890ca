"""Slippery grids, one a client."""

from __future__ import annotations

import numpy as np

from umbel.core.settings import Count, Fraction
from umbel.datasets.federated import Dataset, Info


def grids(*, clients: Count = 4, least_slip: Fraction = 0.0, most_slip: Fraction = 0.4) -> Dataset:
    """How slippery each client's grid is, to learn the way to its last cell.

    Args:
        clients: how many.
        least_slip: the chance that a step of the first goes aside.
        most_slip: of the last; the others lie evenly between.
    """
    x = np.linspace(least_slip, most_slip, clients, dtype=np.float32)[:, None]
    names = np.array([f"grid{i:03d}" for i in range(clients)])
    return Dataset(Info("grids", (1,)), {"x": x}, {"x": x.copy()}, names, names)
