"""Label skew: each class is divided in random proportions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from umbel.core.errors import InputError
from umbel.core.randomness import generator
from umbel.core.settings import Count, Natural, Positive
from umbel.datasets.deal import Deal, by_client, require_rows
from umbel.datasets.federated import Holdings

TRIES = 200


def dirichlet(
    deal: Deal, *, clients: Count = 10, alpha: Positive = 0.5, minimum: Natural = 1
) -> Holdings:
    """Each class divided over the clients by Dirichlet(alpha). Yurochkin et al. 2019 (1905.12022).

    The whole division is drawn again until every client holds the minimum, up to 200 times.

    Args:
        deal: the examples.
        clients: how many.
        alpha: concentration: large is even, small gives most of a class to few clients (cf. Hsu,
            Qi and Brown 2019, arXiv:1909.06335, who draw classes by client instead).
        minimum: examples that every client must hold.

    Raises:
        InputError: no draw gave every client the minimum.
    """
    require_rows(deal, clients, max(minimum, 1))
    totals = np.bincount(deal.labels)
    best = -1
    for attempt in range(TRIES):
        draws = generator(deal.seed, "split", "dirichlet", attempt)
        counts = _counts(draws.dirichlet(np.full(clients, alpha), len(totals)), totals)
        best = max(best, smallest := int(counts.sum(axis=0).min()))
        if smallest >= minimum:
            order = np.lexsort((deal.hashes("dirichlet"), deal.labels))
            client = np.empty(len(deal), dtype=np.int64)
            client[order] = np.repeat(np.tile(np.arange(clients), len(totals)), counts.ravel())
            return by_client(client, clients)
    raise InputError(
        f"minimum = {minimum} cannot be met: in {TRIES} draws of alpha = {alpha} over {clients} "
        f"clients and {len(deal)} examples, the smallest client held at most {best}",
        where="[data.split]",
        fix=f"minimum ≤ {best}, a larger alpha or fewer clients"
        if best
        else "a larger alpha or fewer clients",
    )


def _counts(share: npt.NDArray[np.float64], totals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of each class each client gets, shape (classes, clients); rows sum to ``totals``."""
    cuts = (np.cumsum(share, axis=1) * totals[:, None]).round().astype(np.int64)
    cuts[:, -1] = totals  # the shares sum to 1 only up to rounding
    return np.diff(np.minimum(cuts, totals[:, None]), axis=1, prepend=0)
