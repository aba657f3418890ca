"""FedRep: each client fits its own head first, then the representation that all share."""

from __future__ import annotations

import torch

from umbel.core.settings import Positive, Share
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy
from umbel.strategies.parts.layers import Head, in_head


def fedrep(*, head: Head = 1, head_share: Share = 0.8, server_lr: Positive = 1.0) -> Strategy:
    """FedRep. Collins et al. 2021, Algorithm 1 (arXiv:2102.07078).

    Args:
        head: how many of the last layers never travel, or a pattern of tensor names.
        head_share: share of a round's steps in which the head alone moves; in the others, at least
            one, the rest alone does.
        server_lr: as in FedAvg.
    """

    def after(stepped: Tree, gradient: Tree, local: Local) -> Tree:
        own = in_head(list(stepped), head)
        steps = torch.as_tensor(local.steps)
        first = local.step < torch.minimum((head_share * steps).floor(), steps - 1)
        return {
            name: torch.where(first if name in own else ~first, new, local.params[name])
            for name, new in stepped.items()
        }

    rule = ClientRule(private=lambda names: in_head(names, head), after=after)
    return fedavg(server_lr=server_lr)._replace(client=rule)
