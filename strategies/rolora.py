"""RoLoRA: one factor a round, in turns."""

from __future__ import annotations

import torch

from umbel.core.settings import Positive
from umbel.core.trees import Tree
from umbel.strategies.fedavg import fedavg
from umbel.strategies.parts import ClientRule, Combined, Local, ServerState, Strategy, Trees
from umbel.strategies.parts.low_rank import A, B


def rolora(*, server_lr: Positive = 1.0) -> Strategy:
    """RoLoRA. Chen et al. 2024, Algorithm 1 (arXiv:2409.02346): B in odd rounds, A in even ones.

    With one factor the same at all clients, the mean of products is the product of means.

    Args:
        server_lr: as in FedAvg.
    """
    plain = fedavg(server_lr=server_lr)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        stepped, _ = plain.server(params, {}, mean)
        return stepped, {"done": state["done"] + 1}

    def phase(params: Tree, state: ServerState) -> Trees:
        odd = 1.0 - state["done"] % 2
        return {"trained": {"b": odd, "a": 1.0 - odd}}

    def gradient(gradient: Tree, local: Local) -> Tree:
        return {n: g * _share(n, local).to(g.dtype) for n, g in gradient.items()}

    def after(params: Tree, gradient: Tree, local: Local) -> Tree:
        # Weight decay would move the factor that has no gradient.
        return {n: torch.where(_share(n, local) > 0, p, local.anchor[n]) for n, p in params.items()}

    rule = ClientRule(grad_transforms=(gradient,), after=after)
    return plain._replace(
        init=lambda params: {"done": torch.zeros(())}, client=rule, server=server, broadcast=phase
    )


def _share(name: str, local: Local) -> torch.Tensor:
    """1 where the tensor is trained in this round, else 0."""
    trained = local.shared["trained"]
    if name.endswith((A, B)):
        return trained["a" if name.endswith(A) else "b"]
    return torch.ones_like(trained["a"])
