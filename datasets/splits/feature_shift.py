"""Feature skew: clients whose inputs differ."""

from __future__ import annotations

import numpy as np

from umbel.core.randomness import generator
from umbel.core.settings import Count
from umbel.datasets.deal import Deal, even, in_turn, require_rows
from umbel.datasets.federated import Holdings

CHUNK = 4096


def feature_shift(deal: Deal, *, clients: Count = 10) -> Holdings:
    """Dealt by quantiles of a random projection of x, so that each client sees its own region.

    Sizes differ by at most one.

    Args:
        deal: the examples; their columns are standardised before the projection.
        clients: how many.
    """
    require_rows(deal, clients, 1)
    x = deal.x.reshape(len(deal), -1)
    # Deviations only set the scale of the columns: some thousand rows, evenly spaced, are enough.
    std = x[:: 1 + len(x) // CHUNK].astype(np.float64).std(axis=0)
    direction = generator(deal.seed, "split", "feature-shift").standard_normal(x.shape[1])
    weights = np.divide(direction, std, out=np.zeros_like(direction), where=std > 1e-12)
    place = np.concatenate(
        [x[i : i + CHUNK].astype(np.float64) @ weights for i in range(0, len(x), CHUNK)]
    )
    # Rounded, so that the last bits of a matrix product, which vary by machine, decide nothing;
    # ties go by row.
    place = np.rint((place - place.mean()) / (place.std() or 1.0) * 2**24)
    return in_turn(np.argsort(place, kind="stable"), even(len(deal), clients))
