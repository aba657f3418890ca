"""Ditto: beside its part in FedAvg, each client trains a model of its own, held near the global."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy
from umbel.strategies.parts.rule import Forward, joined, mean


def ditto(*, lam: NonNegative = 0.1, server_lr: Positive = 1.0) -> Strategy:
    """Ditto. Li et al. 2021, Algorithm 1 (arXiv:2012.04221); the global model is FedAvg's.

    The client's own v minimises ``F_k(v) + lam / 2 |v - w_t|^2`` on the same batches, in as many
    steps, as its copy of the global model takes; v stays from round to round.

    Args:
        lam: weight of the proximal term; 0 is local training alone.
        server_lr: as in FedAvg.
    """

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        v = joined(local.params, "v")
        far = torch.stack([(p - local.anchor[name]).square().sum() for name, p in v.items()]).sum()
        own = mean(forward.losses(v, batch), mask) + 0.5 * lam * far
        return mean(forward.losses(local.params, batch), mask) + own

    rule = ClientRule(
        state=lambda params: {"v": params},
        objective=objective,
        joint=("v",),
        personal=lambda params, own: own["v"],
    )
    return fedavg(server_lr=server_lr)._replace(client=rule)
