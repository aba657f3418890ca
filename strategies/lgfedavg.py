"""LG-FedAvg: the first layers are each client's own, the last ones everybody's."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.layers import Head, in_head


def lgfedavg(*, head: Head = 1, server_lr: Positive = 1.0) -> Strategy:
    """LG-FedAvg. Liang et al. 2020, Algorithm 1 (arXiv:2001.01523).

    Args:
        head: how many of the last layers are learned together, or a pattern of tensor names; all
            others never travel.
        server_lr: as in FedAvg.
    """
    rule = ClientRule(private=lambda names: frozenset(names) - in_head(names, head))
    return fedavg(server_lr=server_lr)._replace(client=rule)
