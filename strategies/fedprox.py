"""FedProx: FedAvg whose clients are pulled back towards the global model."""

from __future__ import annotations

from umbel.core.settings import NonNegative, Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Strategy
from umbel.strategies.parts.rule import proximal


def fedprox(*, mu: NonNegative, server_lr: Positive = 1.0) -> Strategy:
    """FedProx. Li et al. 2020, Algorithm 2 (arXiv:1812.06127); mu = 0 is FedAvg.

    Args:
        mu: weight of the proximal term, in units of loss per squared parameter.
        server_lr: as in FedAvg.
    """
    return fedavg(server_lr=server_lr)._replace(client=ClientRule(loss_terms=(proximal(mu),)))
