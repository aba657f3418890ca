"""pFedMe: the global model is what is best to start a client's own model from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad

from umbel.core.settings import Count, Positive
from umbel.core.trees import Tree, map_tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Local, Strategy
from umbel.strategies.parts.rule import Forward, joined, mean, model_part


def pfedme(
    *,
    lam: Positive = 15.0,
    inner_steps: Count = 5,
    inner_lr: Positive = 0.01,
    server_lr: Positive = 1.0,
) -> Strategy:
    """pFedMe. T. Dinh, Tran and Nguyen 2020, Algorithm 1 (arXiv:2006.08848).

    In each step the client finds ``theta ~ argmin f(theta) + lam / 2 |theta - w|^2`` on the batch
    (equation 3), then ``w <- w - eta lam (w - theta)``, a step down the Moreau envelope (equation
    4). theta is the client's own model. ``[client] max_grad_norm`` also bounds how far it moves in
    a step.

    Args:
        lam: weight of the proximal term.
        inner_steps: gradient steps towards theta.
        inner_lr: their size; ``inner_lr * lam`` must be below 2, or they diverge.
        server_lr: the paper's beta.
    """

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        w = model_part(local.params)
        held = map_tree(torch.Tensor.detach, w)

        def loss(theta: Tree) -> Tensor:
            return mean(forward.losses(theta, batch), mask)

        theta: Tree = held
        for _ in range(inner_steps):
            theta = map_tree(
                lambda t, g, x: (t - inner_lr * (g + lam * (t - x))).detach(),
                theta,
                grad(loss)(theta),
                held,
            )
        # A scalar whose gradient is lam (w - theta) for w, and theta's whole way for theta.
        own = joined(local.params, "theta")
        envelope = [(w[n] * (held[n] - t)).sum() for n, t in theta.items()]
        way = [(own[n] * (own[n].detach() - t)).sum() for n, t in theta.items()]
        return lam * torch.stack(envelope).sum() + torch.stack(way).sum()

    def after(stepped: Tree, gradient: Tree, local: Local) -> Tree:
        reached = {n: p - gradient[n] for n, p in local.params.items() if "/" in n}
        return {**stepped, **reached}

    rule = ClientRule(
        state=lambda params: {"theta": params},
        objective=objective,
        joint=("theta",),
        after=after,
        personal=lambda params, own: own["theta"],
    )
    return fedavg(server_lr=server_lr)._replace(client=rule)
