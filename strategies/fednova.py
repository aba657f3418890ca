"""FedNova: deltas are divided by what the clients' numbers of steps make of them."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.errors import InputError
from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree, add_cast, map_tree
from umbel.strategies.parts import (
    ClientRule,
    Combined,
    Delivered,
    Ended,
    ServerState,
    Strategy,
    Trees,
    weighted_mean,
)
from umbel.strategies.parts.rule import proximal


def fednova(*, mu: NonNegative = 0.0, server_lr: Positive = 1.0) -> Strategy:
    """FedNova. Wang et al. 2020, equations 8 and 9 (arXiv:2007.07481).

    ``x <- x + tau_eff sum_i p_i Delta_i / |a_i|_1`` with ``tau_eff = sum_i p_i |a_i|_1``, where a_i
    are the weights of client i's gradients in its Delta: section 4.2 for SGD, for SGD with the
    momentum of ``[client]``, and for the proximal term. With equal steps it is FedAvg.

    Args:
        mu: weight of the proximal term, as in FedProx; not with momentum.
        server_lr: factor on the step.
    """

    def end(ended: Ended) -> Delivered:
        a = accumulated(ended.steps, ended.lr, ended.momentum, mu)
        delta = map_tree(lambda y, x: ((y - x) / a).to(x.dtype), ended.params, ended.anchor)
        return Delivered({"a": {"norm": a}}, delta=delta)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        step = server_lr * mean.extra["a"]["norm"]
        return map_tree(lambda p, d: add_cast(p, step * d), params, mean.delta), state

    def uploads(params: Tree) -> Trees:
        return {"a": {"norm": torch.zeros(())}}

    rule = ClientRule(loss_terms=(proximal(mu),) if mu else (), end=end, sgd=True)
    return Strategy(lambda params: {}, rule, weighted_mean(), server, uploads=uploads)


def accumulated(steps: Tensor, lr: float, momentum: float, mu: float) -> Tensor:
    """``|a_i|_1``: what a client's gradients weigh in its delta, in steps of size ``lr``.

    Raises:
        InputError: momentum and a proximal term, of which the paper has no closed form.
    """
    if momentum and mu:
        raise InputError(
            f"fednova with mu = {mu:g} and [client] momentum = {momentum:g}",
            where="[strategy] mu",
            fix="set one of them to 0",
        )
    if momentum:
        passing = momentum * (1 - momentum**steps) / (1 - momentum)
        return (steps - passing) / (1 - momentum)
    if mu:
        return (1 - (1 - lr * mu) ** steps) / (lr * mu)
    return steps
