"""What a client does besides minimising the loss of its task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from umbel.core.trees import Tree, map_tree


class Local(NamedTuple):
    """What a part may read during a client's local training.

    Args:
        params: the client's parameters before the step, name -> (*shape).
        anchor: the global parameters that the round started from, same names and shapes.
    """

    params: Tree
    anchor: Tree


LossTerm: TypeAlias = Callable[[Local], Tensor]
"""Added to the mean loss of a batch: ``Local`` -> scalar, differentiable in ``params``."""

GradTransform: TypeAlias = Callable[[Tree, Local], Tree]
"""Applied to the gradient of a batch: (gradient, ``Local``) -> gradient."""


class ClientRule(NamedTuple):
    """A composition of small parts, each pure over the trees of ONE client.

    Engines run the same parts in a plain loop and under ``torch.func.vmap``: no part may branch on
    the value of a tensor, change one in place or draw from a global generator.
    """

    loss_terms: tuple[LossTerm, ...] = ()
    grad_transforms: tuple[GradTransform, ...] = ()

    def loss(self, mean_loss: Tensor, local: Local) -> Tensor:
        """The objective of one batch, a scalar."""
        for term in self.loss_terms:
            mean_loss = mean_loss + term(local)
        return mean_loss

    def gradient(self, gradient: Tree, local: Local) -> Tree:
        """The gradient that the optimizer is given."""
        for transform in self.grad_transforms:
            gradient = transform(gradient, local)
        return gradient


@dataclass(frozen=True)
class Proximal:
    """``mu / 2 * ||w - w_global||^2``, in units of the loss; data, so that others can read ``mu``.

    Source: Li et al. 2020, FedProx, equation 2 (arXiv:1812.06127).
    """

    mu: float

    def __call__(self, local: Local) -> Tensor:
        """The term for one client, a scalar."""
        squares = [(p - local.anchor[name]).square().sum() for name, p in local.params.items()]
        return 0.5 * self.mu * torch.stack(squares).sum()


def proximal(mu: float) -> LossTerm:
    """The proximal term of FedProx."""
    return Proximal(mu)


def clip_gradient(max_norm: float) -> GradTransform:
    """Scales the gradient of a batch so that its global L2 norm is at most ``max_norm``.

    Guarantees: direction kept; a zero gradient stays zero. The same rule as
    ``torch.nn.utils.clip_grad_norm_``, which adds 1e-6 to the norm.

    Source: Pascanu, Mikolov and Bengio 2013, Algorithm 1 (arXiv:1211.5063).
    """

    def transform(gradient: Tree, local: Local) -> Tree:
        total = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
        scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        return map_tree(lambda g: g * scale, gradient)

    return transform
