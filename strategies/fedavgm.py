"""FedAvgM: FedAvg with momentum at the server."""

from __future__ import annotations

from umbel.core.settings import Fraction, Positive
from umbel.core.trees import Tree, add_cast, map_tree, zeros_like
from umbel.strategies.parts import ClientRule, Combined, ServerState, Strategy, weighted_mean


def fedavgm(*, server_lr: Positive = 1.0, momentum: Fraction = 0.9) -> Strategy:
    """FedAvgM. Hsu, Qi and Brown 2019, section 4.2 (arXiv:1909.06335); momentum = 0 is FedAvg.

    Args:
        server_lr: factor on the momentum.
        momentum: beta of ``v = beta v + mean delta``.
    """

    def init(params: Tree) -> ServerState:
        return {"v": zeros_like(params)}

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        v = map_tree(lambda v, d: momentum * v + d.to(v.dtype), state["v"], mean.delta)
        return map_tree(lambda p, v: add_cast(p, server_lr * v), params, v), {"v": v}

    return Strategy(init, ClientRule(), weighted_mean(), server)
