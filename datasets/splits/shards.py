"""Few classes a client: the pathological split."""

from __future__ import annotations

import numpy as np

from umbel.core.randomness import key, permutation
from umbel.core.settings import Count
from umbel.datasets.deal import Deal, by_client, even, require_rows
from umbel.datasets.federated import Holdings


def shards(deal: Deal, *, clients: Count = 10, shards_per_client: Count = 2) -> Holdings:
    """Sorted by label, cut into equal shards, some to each client. McMahan et al. 2017, section 3.

    Args:
        deal: the examples; which of a class are in which of its shards is drawn.
        clients: how many.
        shards_per_client: 2 in the paper, so that most clients see two classes.
    """
    require_rows(deal, clients, shards_per_client, "shards_per_client")
    count = clients * shards_per_client
    order = np.lexsort((deal.hashes("shards"), deal.labels))
    holder = permutation(key(deal.seed, "split", "shards", "deal"), count) // shards_per_client
    client = np.empty(len(deal), dtype=np.int64)
    client[order] = np.repeat(holder, even(len(deal), count))
    return by_client(client, clients)
