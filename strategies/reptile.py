"""Reptile: the global model moves towards what clients' models become."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Strategy


def reptile(*, server_lr: Positive = 0.5) -> Strategy:
    """Reptile, its batched version. Nichol et al. 2018, Algorithm 2 (arXiv:1803.02999).

    A client's local training is the paper's k inner steps. ``server_lr = 1`` is FedAvg; the paper
    has every task count the same: ``weights = "uniform"``.

    Args:
        server_lr: epsilon, the share of the mean delta that is taken.
    """
    return fedavg(server_lr=server_lr)
