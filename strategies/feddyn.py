"""FedDyn: a linear term aligns each client's optimum with everybody's."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.core.trees import Tree, add_cast, map_tree, zeros_like
from umbel.strategies.parts import (
    ClientRule,
    Combined,
    Delivered,
    Ended,
    Local,
    ServerState,
    Strategy,
    weighted_mean,
)


def feddyn(*, alpha: Positive = 0.1) -> Strategy:
    """FedDyn. Acar et al. 2021, Algorithm 1 (arXiv:2111.04263).

    Client: minimises ``L_k(w) - <g_k, w> + alpha / 2 |w - x|^2``, then ``g_k <- g_k - alpha (w -
    x)``. Server: ``h <- h - alpha |S| / N mean(w_k - x)`` and ``x <- mean(w_k) - h / alpha``. The
    paper is ``weights = "uniform"``; otherwise clients count by their examples throughout.

    Args:
        alpha: weight of the dynamic regulariser, in units of loss per squared parameter.
    """

    def init(params: Tree) -> ServerState:
        return {"h": zeros_like(params)}

    def regularised(gradient: Tree, local: Local) -> Tree:
        return map_tree(
            lambda g, mine, w, x: g - mine + alpha * (w - x),
            gradient,
            local.own["g"],
            local.params,
            local.anchor,
        )

    def end(ended: Ended) -> Delivered:
        g = map_tree(
            lambda g, w, x: g - alpha * (w - x), ended.own["g"], ended.params, ended.anchor
        )
        return Delivered(own={"g": g})

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        h = map_tree(lambda h, d: add_cast(h, -alpha * mean.share * d), state["h"], mean.delta)
        step = map_tree(lambda d, h: d - h.double() / alpha, mean.delta, h)
        return map_tree(add_cast, params, step), {"h": h}

    rule = ClientRule(
        grad_transforms=(regularised,), state=lambda params: {"g": zeros_like(params)}, end=end
    )
    return Strategy(init, rule, weighted_mean(), server)
