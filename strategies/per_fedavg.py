"""Per-FedAvg: a model from which one step on a client's own examples is good."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree, map_tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy
from umbel.strategies.parts.meta import adapt, deal, gradient
from umbel.strategies.parts.multi import towards
from umbel.strategies.parts.rule import Forward


def per_fedavg(
    *,
    inner_lr: NonNegative = 0.01,
    hessian: Literal["free", "none"] = "free",
    step: Positive = 1e-3,
    server_lr: Positive = 1.0,
) -> Strategy:
    """Per-FedAvg (HF) or (FO). Fallah et al. 2020, Algorithm 1 (arXiv:2002.07948).

    Each batch is dealt in thirds D, D' and D'': with ``w' = w - alpha grad f_D(w)`` the gradient
    is ``(I - alpha H_D''(w)) grad f_D'(w')``, where HF takes the product with the Hessian from two
    gradients (equation 10) and FO leaves it out (equation 9).

    Args:
        inner_lr: alpha.
        hessian: ``free``: HF; ``none``: FO.
        step: delta of equation 10, in units of the parameters over those of a gradient.
        server_lr: as in FedAvg.
    """

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        first, second, third = deal(batch, mask, [1 / 3, 1 / 3])
        params = map_tree(torch.Tensor.detach, local.params)
        direction = gradient(
            forward, adapt(forward, params, first, inner_lr, 1, first=True), second
        )
        if hessian == "free":
            ahead = gradient(forward, map_tree(lambda p, g: p + step * g, params, direction), third)
            behind = gradient(
                forward, map_tree(lambda p, g: p - step * g, params, direction), third
            )
            direction = map_tree(
                lambda g, a, b: g - inner_lr * (a - b) / (2 * step), direction, ahead, behind
            )
        return towards(local.params, direction)

    return fedavg(server_lr=server_lr)._replace(client=ClientRule(objective=objective))
