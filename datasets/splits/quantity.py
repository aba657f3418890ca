"""Quantity skew: clients of very different sizes, each with the same mix."""

from __future__ import annotations

import numpy as np

from umbel.core.randomness import generator
from umbel.core.settings import Count, Natural, Positive
from umbel.datasets.deal import Deal, in_turn, require_rows
from umbel.datasets.federated import Holdings


def quantity(
    deal: Deal, *, clients: Count = 10, alpha: Positive = 0.5, minimum: Natural = 1
) -> Holdings:
    """Shuffled, with sizes by Dirichlet(alpha). Li et al. 2022, section 4.3 (arXiv:2102.02079).

    Args:
        deal: the examples.
        clients: how many.
        alpha: concentration of the sizes: small makes a few clients very large.
        minimum: examples that every client gets first; the rest is divided by the proportions.
    """
    require_rows(deal, clients, max(minimum, 1))
    share = generator(deal.seed, "split", "quantity").dirichlet(np.full(clients, alpha))
    rest = len(deal) - clients * minimum
    cuts = np.minimum((np.cumsum(share) * rest).round().astype(np.int64), rest)
    cuts[-1] = rest
    order = deal.shuffled("quantity")
    return in_turn(order, minimum + np.diff(cuts, prepend=0))
