"""CartPoles, one a client."""

from __future__ import annotations

import numpy as np

from umbel.core import randomness
from umbel.core.settings import Count, Natural, NonNegative
from umbel.datasets.federated import Dataset, Info
from umbel.datasets.worlds.cartpole import PHYSICS, various


def cartpoles(*, clients: Count = 4, spread: NonNegative = 0.5, draw: Natural = 0) -> Dataset:
    """The physics of a CartPole for each client, to learn to balance it; the first is Gymnasium's.

    Args:
        clients: how many.
        spread: gravity, masses, length and force of the others are off by factors up to
            1 + spread.
        draw: of these factors.
    """
    x = various(clients, spread, randomness.generator(draw, "cartpoles"))
    names = np.array([f"pole{i:03d}" for i in range(clients)])
    return Dataset(Info("cartpoles", (len(PHYSICS),)), {"x": x}, {"x": x.copy()}, names, names)
