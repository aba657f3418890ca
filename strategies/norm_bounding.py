"""Norm bounding: no client moves the mean by more than a fixed length."""

from __future__ import annotations

import torch

from umbel.core.payloads import Updates
from umbel.core.settings import Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import Combiner, Strategy, weighted_mean


def norm_bounding(*, clip_norm: Positive, server_lr: Positive = 1.0) -> Strategy:
    """FedAvg of deltas no longer than a bound. Sun et al. 2019, section 3 (arXiv:1911.07963).

    The one robust rule that is a sum, so that it needs memory for one delta only. It honours
    ``weights``; with ``uniform`` ones no client moves the mean by more than clip_norm / n.

    Args:
        clip_norm: bound on the L2 norm of a delta: parameters and floating buffers.
        server_lr: as in FedAvg.
    """
    mean = weighted_mean()

    def add(sums: object, updates: Updates) -> object:
        return mean.add(sums, clipped(updates, clip_norm))

    combiner: Combiner = mean._replace(add=add)
    return fedavg(server_lr=server_lr)._replace(combine=combiner)


def clipped(updates: Updates, clip_norm: float) -> Updates:
    """The same updates, none longer than ``clip_norm``; floating deltas in float64."""
    floating = {n: d.double() for n, d in updates.delta.items() if d.dtype.is_floating_point}
    count = len(updates.clients)
    squares = [d.reshape(count, -1).square().sum(1).cpu() for d in floating.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    scale = torch.where(norms > clip_norm, clip_norm / norms, 1.0)
    delta: Tree = {
        name: d * scale.to(d.device).view(-1, *[1] * (d.dim() - 1)) for name, d in floating.items()
    }
    return Updates(
        updates.round,
        updates.clients,
        {**updates.delta, **delta},
        updates.weights,
        updates.metrics,
    )
