"""APFL: each client mixes a model of its own with the global one, in a share that it learns."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge, Le
from torch import Tensor

from umbel.core.settings import Positive
from umbel.core.trees import Tree, map_tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy, Trees
from umbel.strategies.parts.rule import Forward, joined, mean, model_part

ALPHA = "alpha/alpha"


def apfl(
    *,
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5,
    adaptive: bool = True,
    server_lr: Positive = 1.0,
) -> Strategy:
    """APFL. Deng, Kamani and Mahdavi 2020, Algorithm 1 (arXiv:2003.13461).

    ``w <- w - eta grad f(w)``, ``v <- v - eta grad_v f(alpha v + (1 - alpha) w)``, and with
    ``adaptive`` alpha moves down the same loss (equation 10), within 0 … 1. The client's own model
    is ``alpha v + (1 - alpha) w``; alpha = 0 is FedAvg.

    Args:
        alpha: share of the client's own v at first.
        adaptive: whether each client learns its share.
        server_lr: as in FedAvg.
    """

    def mixed(v: Tree, w: Tree, share: Tensor) -> dict[str, Tensor]:
        return map_tree(lambda own, common: share * own + (1 - share) * common, v, w)

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        w = model_part(local.params)
        held = map_tree(torch.Tensor.detach, w)
        own = mixed(joined(local.params, "v"), held, local.params[ALPHA])
        return mean(forward.losses(w, batch), mask) + mean(forward.losses(own, batch), mask)

    def after(stepped: Tree, gradient: Tree, local: Local) -> Tree:
        share = stepped[ALPHA].clamp(0, 1) if adaptive else local.params[ALPHA]
        return {**stepped, ALPHA: share}

    def state(params: Tree) -> Trees:
        like = next(iter(params.values()))
        return {"v": params, "alpha": {"alpha": like.new_tensor(alpha)}}

    rule = ClientRule(
        state=state,
        objective=objective,
        joint=("v", "alpha"),
        after=after,
        personal=lambda params, own: mixed(own["v"], params, own["alpha"]["alpha"]),
    )
    return fedavg(server_lr=server_lr)._replace(client=rule)
