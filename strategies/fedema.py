"""FedEMA: a client goes on from a mixture of the global model and its own, by how far they are."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree, map_tree, norm, subtract
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Delivered, Ended, Strategy, Trees


def fedema(*, tau: NonNegative = 0.7, server_lr: Positive = 1.0) -> Strategy:
    """FedEMA. Zhuang, Wen and Zhang 2022, equations 2 to 4 (arXiv:2204.04385).

    ``W_k <- mu W_k + (1 - mu) W`` with ``mu = min(lambda_k |W - W_k|, 1)``, where W_k is what the
    client ended its last round with, and lambda_k makes mu equal tau in its second. For
    self-supervised encoders of clients that see other things. The distance is over all parameters,
    predictor included.

    Args:
        tau: how much of its own a client keeps; 0 is FedAvg.
        server_lr: as in FedAvg.
    """

    def scale(far: Tensor, own: Trees) -> Tensor:
        before = own["scale"]["lambda"]
        first = torch.where(far > 0, tau / far.clamp(min=1e-30), 0.0)
        return torch.where(before > 0, before, first)

    def state(params: Tree) -> Trees:
        some = next(iter(params.values()))
        zero = some.new_zeros((), dtype=torch.float32)
        return {"last": params, "scale": {"lambda": zero}}

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        far = norm(subtract(anchor, own["last"]))
        mu = (scale(far, own) * far).clamp(max=1.0)
        return map_tree(lambda g, k: g + mu.to(g.dtype) * (k - g), anchor, own["last"])

    def end(ended: Ended) -> Delivered:
        kept = scale(norm(subtract(ended.anchor, ended.own["last"])), ended.own)
        return Delivered(own={"last": ended.params, "scale": {"lambda": kept.float()}})

    rule = ClientRule(state=state, begin=begin, end=end)
    return fedavg(server_lr=server_lr)._replace(client=rule)
