"""q-FedAvg: clients whom the model serves badly count for more."""

from __future__ import annotations

import torch

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree, add_cast, map_tree
from umbel.strategies.parts import (
    ClientRule,
    Combined,
    Delivered,
    Ended,
    ServerState,
    Strategy,
    Trees,
    weighted_mean,
)

TINY = 1e-10
"""Added to a loss, so that a client without one does not divide by zero."""


def qfedavg(*, q: NonNegative = 1.0, server_lr: Positive = 1.0) -> Strategy:
    """q-FedAvg. Li et al. 2020, Algorithm 2 (arXiv:1905.10497); q = 0 is FedAvg.

    With ``L = 1 / eta``, ``Dw_k = L (w - w_k)`` and F_k the global model's loss at client k:
    ``w <- w - sum_k F_k^q Dw_k / sum_k h_k``, ``h_k = q F_k^(q-1) |Dw_k|^2 + L F_k^q``. The paper
    sums over clients alike, which is ``weights = "uniform"``.

    Args:
        q: how much fairness; 0 weighs no client by its loss.
        server_lr: factor on the step.
    """

    def end(ended: Ended) -> Delivered:
        loss, lipschitz = ended.loss + TINY, 1 / ended.lr
        moved = map_tree(lambda y, x: lipschitz * (y - x), ended.params, ended.anchor)
        squares = torch.stack([d.float().square().sum() for d in moved.values()]).sum()
        h = q * loss ** (q - 1) * squares + lipschitz * loss**q
        delta = map_tree(lambda d: (loss**q * d).to(d.dtype), moved)
        return Delivered({"h": {"h": h}}, delta=delta)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        rate = server_lr / mean.extra["h"]["h"].clamp(min=TINY)
        return map_tree(lambda p, d: add_cast(p, rate * d), params, mean.delta), state

    def uploads(params: Tree) -> Trees:
        return {"h": {"h": torch.zeros(())}}

    rule = ClientRule(end=end, initial_loss=True)
    return Strategy(lambda params: {}, rule, weighted_mean(), server, uploads=uploads)
