"""FedCurv: clients keep to what the other clients' parameters depend on."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import NonNegative, Positive
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
from umbel.strategies.parts.rule import model_part
from umbel.strategies.parts.tally import tallied

FISHER, PULL, SQUARES, ALL = "fisher", "pull", "squares", "all"


def fedcurv(*, strength: NonNegative = 1.0, server_lr: Positive = 1.0) -> Strategy:
    """FedCurv. Shoham et al. 2019, equations 4 to 6 (arXiv:1910.07796); strength = 0 is FedAvg.

    Client s minimises ``L_s + strength sum_{j != s} (theta - theta_j)^T F_j (theta - theta_j)``:
    each sends ``F_j`` and ``F_j theta_j``, everybody is sent their sums, and takes its own out. A
    client that sits out a round counts with what it sent last. With ``weights = "uniform"`` the
    sums are the paper's; otherwise clients count in them by their examples, and take their own out
    as if all had as many.

    F_j is the mean square of the gradients of a round's batches, where the paper takes single
    examples at the end of it: no pass of its own, and the same up to a factor at a minimum.

    Args:
        strength: lambda.
        server_lr: as in FedAvg.
    """

    def sums(params: Tree) -> Trees:
        return {FISHER: zeros_like(params), PULL: zeros_like(params)}

    def init(params: Tree) -> ServerState:
        return {**sums(params), ALL: {"clients": torch.zeros(())}}

    def others(local: Local) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """``sum F_j`` and ``sum F_j theta_j`` over the other clients."""
        count = local.shared[ALL]["clients"]
        a, b = (
            map_tree(
                lambda mean, mine: count * mean - mine, local.shared[letter], local.own[letter]
            )
            for letter in (FISHER, PULL)
        )
        # Rounding, or uneven weights, may leave less than nothing: that would push away.
        return map_tree(lambda f: f.clamp(min=0), a), map_tree(
            lambda f, p: torch.where(f > 0, p, 0), a, b
        )

    def penalty(local: Local) -> Tensor:
        a, b = others(local)
        parts = [(p * (a[n] * p - 2 * b[n])).sum() for n, p in local.params.items()]
        return strength * torch.stack(parts).sum()

    def squared(gradient: Tree, moved: Tree, local: Local) -> Tree:
        a, b = others(local)
        at = model_part(local.params)
        return {n: (g - 2 * strength * (a[n] * at[n] - b[n])).square() for n, g in gradient.items()}

    def end(ended: Ended) -> Delivered:
        fisher = map_tree(lambda total: (total / ended.steps).to(total.dtype), ended.own[SQUARES])
        now = {FISHER: fisher, PULL: map_tree(torch.mul, fisher, ended.params)}
        return Delivered({n: subtract(tree, ended.own[n]) for n, tree in now.items()}, now)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        means = {
            letter: map_tree(
                lambda old, change: add_cast(old, mean.share * change),
                state[letter],
                mean.extra[letter],
            )
            for letter in (FISHER, PULL)
        }
        count = torch.tensor(float(mean.population))
        stepped = map_tree(lambda p, d: add_cast(p, server_lr * d), params, mean.delta)
        return stepped, {**means, ALL: {"clients": count}}

    rule = ClientRule(loss_terms=(penalty,), state=sums, end=end)
    return Strategy(
        init,
        tallied(rule, SQUARES, squared),
        weighted_mean(),
        server,
        broadcast=lambda params, state: {n: state[n] for n in (FISHER, PULL, ALL)},
        uploads=sums,
    )
