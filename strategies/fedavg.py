"""FedAvg: the global model moves by the weighted mean of the clients' deltas."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.core.trees import Tree, add_cast, map_tree
from umbel.strategies.parts import ClientRule, Combined, ServerState, Strategy, weighted_mean


def fedavg(*, server_lr: Positive = 1.0) -> Strategy:
    """FedAvg. McMahan et al. 2017, Algorithm 1 (arXiv:1602.05629).

    Args:
        server_lr: factor on the mean delta; 1 is the paper's average of models.
    """

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        return map_tree(lambda p, d: add_cast(p, server_lr * d), params, mean.delta), state

    return Strategy(lambda params: {}, ClientRule(), weighted_mean(), server)
