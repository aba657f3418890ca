"""Meta-SGD: MAML that also learns how far each parameter moves."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive, Share
from umbel.core.trees import Tree, add_cast, map_tree
from umbel.strategies.parts import (
    ClientRule,
    Combined,
    Delivered,
    Ended,
    Local,
    ServerState,
    Strategy,
    Trees,
    weighted_mean,
)
from umbel.strategies.parts.meta import adapt, deal
from umbel.strategies.parts.rule import Forward, joined, mean, model_part


def meta_sgd(
    *, inner_lr: NonNegative = 0.01, support: Share = 0.5, server_lr: Positive = 1.0
) -> Strategy:
    """Meta-SGD. Li et al. 2017, Algorithm 1 (arXiv:1707.09835).

    A rate alpha for each parameter, broadcast, trained along with the model by the clients'
    optimizer, and averaged as the model is. Federated as in Chen et al. 2018, Algorithm 1
    (arXiv:1802.07876).

    Args:
        inner_lr: what every alpha begins as.
        support: share of each batch that is adapted to; 1 uses the whole batch for both.
        server_lr: as in FedAvg.
    """

    def rates(params: Tree) -> Trees:
        return {"alpha": map_tree(lambda p: torch.full_like(p, inner_lr), params)}

    def broadcast(params: Tree, state: ServerState) -> Trees:
        return {"alpha": state["alpha"]}

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        return {**anchor, **{f"alpha/{name}": a for name, a in shared["alpha"].items()}}

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        known, asked = deal(batch, mask, [support])
        alpha = joined(local.params, "alpha")
        params = adapt(forward, model_part(local.params), known, alpha, 1, first=False)
        return mean(forward.losses(params, asked.batch), asked.mask)

    def end(ended: Ended) -> Delivered:
        moved = map_tree(lambda a, b: a - b, ended.own["alpha"], ended.shared["alpha"])
        return Delivered(uploads={"alpha": moved})

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        alpha = map_tree(
            lambda a, d: add_cast(a, server_lr * d), state["alpha"], mean.extra["alpha"]
        )
        stepped = map_tree(lambda p, d: add_cast(p, server_lr * d), params, mean.delta)
        return stepped, {"alpha": alpha}

    rule = ClientRule(begin=begin, end=end, objective=objective, joint=("alpha",))
    return Strategy(rates, rule, weighted_mean(), server, broadcast, rates)
