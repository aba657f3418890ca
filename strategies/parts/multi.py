"""The gradients of the parts of a task, one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad_and_value

from umbel.core.trees import Tree, map_tree
from umbel.strategies.parts.rule import Forward, mean, model_part


def part_gradients(
    forward: Forward, params: Tree, batch: Tree, mask: Tensor | None
) -> tuple[Tensor, list[Tree]]:
    """Each part's mean loss (parts,), and its gradient; none of it can be differentiated.

    Args:
        forward: of a task with several parts.
        params: as ``Local.params``.
        batch: columns (B, …).
        mask: (B,) which examples count.
    """
    fixed = map_tree(torch.Tensor.detach, model_part(params))
    count = forward.parts(fixed, batch).shape[1]
    gradients: list[Tree] = []
    losses: list[Tensor] = []
    for part in range(count):

        def loss(at: Tree, part: int = part) -> Tensor:
            return mean(forward.parts(at, batch)[:, part], mask)

        gradient, value = grad_and_value(loss)(fixed)
        gradients.append(map_tree(torch.Tensor.detach, gradient))
        losses.append(value.detach())
    return torch.stack(losses), gradients


def towards(params: Tree, gradient: Tree) -> Tensor:
    """A scalar whose gradient in ``params`` is ``gradient``."""
    return torch.stack([(params[n] * g.detach()).sum() for n, g in gradient.items()]).sum()


def dot(left: Tree, right: Tree) -> Tensor:
    """The inner product of two trees, a scalar."""
    return torch.stack([(left[n] * right[n]).sum() for n in left]).sum()


def heads(params: Tree) -> int:
    """How many heads, ``heads.0.…`` and on, a model has; at least one."""
    found = {n.split(".")[1] for n in params if n.startswith("heads.")}
    return max(1, len(found))
