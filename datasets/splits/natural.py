"""The owners that the data set itself names."""

from __future__ import annotations

import numpy as np

from umbel.core.errors import InputError
from umbel.core.settings import Count
from umbel.datasets.deal import Deal
from umbel.datasets.federated import Holdings


def natural(deal: Deal, *, minimum: Count = 1) -> Holdings:
    """One client an owner (hospital, user, speaker, …), in the order of their names.

    Args:
        deal: the examples with their owners.
        minimum: owners with fewer examples are left out.

    Raises:
        InputError: the data set names no owners, or none has the minimum.
    """
    if deal.owner is None:
        raise InputError(
            "split 'natural' needs a data set that names the owner of each example",
            where="[data.split]",
            fix="kind = 'iid', 'dirichlet', …; or give the data a client column",
        )
    names, owner, sizes = np.unique(deal.owner, return_inverse=True, return_counts=True)
    kept = sizes >= minimum
    if not kept.any():
        raise InputError(
            f"minimum = {minimum} leaves none of {len(names)} clients; the largest holds "
            f"{sizes.max()} examples",
            where="[data.split]",
            fix=f"minimum ≤ {sizes.max()}",
        )
    order = np.argsort(owner, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(sizes[kept])]).astype(np.int64)
    return Holdings(offsets, order[kept[owner[order]]].astype(np.int32))
