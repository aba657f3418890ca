"""Equal shares of a shuffled data set."""

from __future__ import annotations

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
    return in_turn(deal.shuffled("iid"), even(len(deal), clients))
