"""Equal shares of a shuffled data set."""

from __future__ import annotations

import numpy as np

from umbel.core.settings import Count
from umbel.datasets.deal import Deal, even, in_turn, require_rows
from umbel.datasets.federated import Holdings


def iid(deal: Deal, *, clients: Count = 10) -> Holdings:
    """Shuffled and dealt evenly; sizes differ by at most one. McMahan et al. 2017, section 3.

    Args:
        deal: the examples.
        clients: how many; at most one an example.
    """
    require_rows(deal, clients, 1)
    order = np.argsort(deal.hashes("iid"), kind="stable")
    return in_turn(order, even(len(deal), clients))
