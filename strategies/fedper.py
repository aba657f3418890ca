"""FedPer: the last layers are each client's own."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.layers import Head, in_head


def fedper(*, head: Head = 1, server_lr: Positive = 1.0) -> Strategy:
    """FedPer. Arivazhagan et al. 2019, Algorithms 1 and 2 (arXiv:1912.00818).

    Args:
        head: how many of the last layers never travel, or a pattern of tensor names.
        server_lr: as in FedAvg.
    """
    rule = ClientRule(private=lambda names: in_head(names, head))
    return fedavg(server_lr=server_lr)._replace(client=rule)
