"""SCAFFOLD: control variates take the drift out of the clients' steps."""

from __future__ import annotations

from umbel.core.settings import Positive
from umbel.core.trees import Tree, add_cast, map_tree, subtract, zeros_like
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


def scaffold(*, server_lr: Positive = 1.0) -> Strategy:
    """SCAFFOLD. Karimireddy et al. 2020, Algorithm 1 with option II (arXiv:1910.06378).

    Client: ``y <- y - eta_l (g(y) - c_i + c)`` (equation 3), then ``c_i+ = c_i - c + (x - y) /
    (K eta_l)`` (equation 4). Server: ``x <- x + eta_g mean(y_i - x)`` and ``c <- c + |S| / N
    mean(c_i+ - c_i)`` (equation 5). With ``weights = "uniform"`` that is the paper; otherwise
    clients count by their examples in both means and in |S| / N, so that c stays the mean of the
    c_i. Assumes plain SGD at the clients.

    Args:
        server_lr: eta_g.
    """

    def init(params: Tree) -> ServerState:
        return {"c": zeros_like(params)}

    def corrected(gradient: Tree, local: Local) -> Tree:
        return map_tree(
            lambda g, mine, everybody: g - mine + everybody,
            gradient,
            local.own["c"],
            local.shared["c"],
        )

    def end(ended: Ended) -> Delivered:
        work = ended.steps * ended.lr
        c = map_tree(
            lambda mine, everybody, x, y: mine - everybody + ((x - y) / work).to(x.dtype),
            ended.own["c"],
            ended.shared["c"],
            ended.anchor,
            ended.params,
        )
        return Delivered({"c": subtract(c, ended.own["c"])}, {"c": c})

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        c = map_tree(lambda c, d: add_cast(c, mean.share * d), state["c"], mean.extra["c"])
        return map_tree(lambda p, d: add_cast(p, server_lr * d), params, mean.delta), {"c": c}

    def variates(params: Tree) -> Trees:
        return {"c": zeros_like(params)}

    rule = ClientRule(grad_transforms=(corrected,), state=variates, end=end, plain_sgd=True)
    return Strategy(
        init,
        rule,
        weighted_mean(),
        server,
        broadcast=lambda params, state: {"c": state["c"]},
        uploads=variates,
    )
