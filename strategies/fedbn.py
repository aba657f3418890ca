"""FedBN: each client normalises by its own statistics."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.layers import normalised


def fedbn(*, server_lr: Positive = 1.0) -> Strategy:
    """FedBN. Li et al. 2021, Algorithm 1 (arXiv:2102.07623): BatchNorm layers never travel.

    Args:
        server_lr: as in FedAvg.
    """
    return fedavg(server_lr=server_lr)._replace(client=ClientRule(private=normalised))
