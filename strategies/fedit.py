"""FedIT: FedAvg on the factors of low-rank adapters."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Strategy
from umbel.strategies.parts.low_rank import error, with_products


def fedit(*, server_lr: Positive = 1.0) -> Strategy:
    """FedIT. Zhang et al. 2023, section 3.3 (arXiv:2305.05644): A and B are averaged apart.

    The model is FedAvg's; each round records ``aggregation_error``, what that loses.

    Args:
        server_lr: as in FedAvg.
    """
    return fedavg(server_lr=server_lr)._replace(combine=with_products(), figures=error)
