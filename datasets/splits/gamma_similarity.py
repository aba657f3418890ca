"""Label skew between none and full: a share is dealt at random, the rest by label."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from annotated_types import Ge, Le

from umbel.core.settings import Count
from umbel.datasets.deal import Deal, by_client, even, require_rows
from umbel.datasets.federated import Holdings


def gamma_similarity(
    deal: Deal, *, clients: Count = 10, gamma: Annotated[float, Ge(0), Le(1)] = 0.5
) -> Holdings:
    """A share gamma dealt evenly at random, the rest sorted by label and cut.

    As in SCAFFOLD's experiments (Karimireddy et al. 2020, section 7.1, arXiv:1910.06378) and the
    benchmark of ByzFL (González et al. 2025, arXiv:2505.24802): 1 is IID, 0 gives most clients one
    or two classes.

    Args:
        deal: the examples; which of them are dealt at random is drawn.
        clients: how many.
        gamma: the share.
    """
    require_rows(deal, clients, 1)
    order = deal.shuffled("gamma-similarity")
    similar, rest = np.split(order, [int(len(deal) * gamma)])
    rest = rest[np.argsort(deal.labels[rest], kind="stable")]
    client = np.empty(len(deal), dtype=np.int64)
    for part in (similar, rest):
        client[part] = np.repeat(np.arange(clients), even(len(part), clients))
    return by_client(client, clients)
