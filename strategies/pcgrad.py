"""PCGrad: parts of a task whose gradients conflict give way to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import Positive
from umbel.core.trees import Tree, map_tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy
from umbel.strategies.parts.multi import dot, part_gradients, towards
from umbel.strategies.parts.rule import Forward


def pcgrad(*, server_lr: Positive = 1.0) -> Strategy:
    """FedAvg whose clients project conflicting gradients. Yu et al. 2020, Algorithm 1
    (arXiv:2001.06782).

    The paper visits the others in random order; here the order turns with each step, so that a
    step is a function of its number. For tasks with several parts, such as ``multi-task``.

    Args:
        server_lr: as in FedAvg.
    """

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        _, found = part_gradients(forward, local.params, batch, mask)
        count, total = len(found), map_tree(torch.zeros_like, found[0])
        for i, own in enumerate(found):
            for turn in range(1, count):
                other = found[(i + 1 + (turn - 1 + local.step) % (count - 1)) % count]
                along = dot(own, other)
                share = torch.where(along < 0, along / dot(other, other).clamp(min=1e-20), 0.0)
                own = map_tree(lambda a, b, s=share: a - s * b, own, other)
            total = map_tree(torch.add, total, own)
        return towards(local.params, total)

    return fedavg(server_lr=server_lr)._replace(client=ClientRule(objective=objective))
