"""The common frame of FedAdagrad, FedAdam and FedYogi."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umbel.core.trees import Tree, add_cast, map_tree, zeros_like
from umbel.strategies.parts.combine import Combined, weighted_mean
from umbel.strategies.parts.rule import ClientRule
from umbel.strategies.parts.strategy import ServerState, Strategy


def adaptive(
    second_moment: Callable[[Tensor, Tensor], Tensor], *, server_lr: float, beta1: float, tau: float
) -> Strategy:
    """``x + eta m / (sqrt(v) + tau)``, with ``m = beta1 m + (1 - beta1) Delta``.

    As in the paper there is no bias correction, and ``v`` starts from tau squared.

    Args:
        second_moment: (v, squared mean delta) -> v, elementwise.
        server_lr: eta.
        beta1: of the first moment.
        tau: degree of adaptivity, in units of the delta.

    Source: Reddi et al. 2021, Algorithm 2 (arXiv:2003.00295).
    """

    def init(params: Tree) -> ServerState:
        return {
            "m": zeros_like(params),
            "v": map_tree(lambda p: torch.full_like(p, tau**2), params),
        }

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        delta = map_tree(lambda d, p: d.to(p.dtype), mean.delta, params)
        m = map_tree(lambda m, d: beta1 * m + (1 - beta1) * d, state["m"], delta)
        v = map_tree(lambda v, d: second_moment(v, d.square()), state["v"], delta)
        step = map_tree(lambda m, v: server_lr * m / (v.sqrt() + tau), m, v)
        return map_tree(add_cast, params, step), {"m": m, "v": v}

    return Strategy(init, ClientRule(), weighted_mean(), server)
