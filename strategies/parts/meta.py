"""Learning to adapt: a batch has a support part, to adapt to, and a query part, to be good at."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad

from umbel.core.trees import Tree, map_tree
from umbel.strategies.parts.rule import Forward, Local, Objective, mean


class Side(NamedTuple):
    """Some examples of a batch: columns (B, …), and which of the B count; ``None``: all."""

    batch: Tree
    mask: Tensor | None


def deal(batch: Tree, mask: Tensor | None, shares: Sequence[float]) -> list[Side]:
    """Consecutive parts of a batch, one a share, and one of what is left; none is empty.

    Where a batch has too few examples for a part, that part is all of the batch.

    Args:
        batch: columns (B, …).
        mask: (B,), true for the first so many; ``None``: for all.
        shares: of the examples, each above 0, together below 1.
    """
    bounds = [sum(shares[: i + 1]) for i in range(len(shares))]
    size = len(next(iter(batch.values())))
    if mask is None:
        ends = [0, *(math.floor(size * bound + 0.5) for bound in bounds), size]
        parts = [(a, b) if a < b else (0, size) for a, b in itertools.pairwise(ends)]
        return [Side(map_tree(lambda t, a=a, b=b: t[a:b], batch), None) for a, b in parts]
    # The same in numbers that may differ from client to client: nothing is cut, only masked.
    count, place = mask.sum(), torch.arange(size, device=mask.device)
    cuts = [torch.floor(count.double() * bound + 0.5) for bound in bounds]
    limits = [torch.zeros_like(count), *cuts, count]
    sides = []
    for a, b in itertools.pairwise(limits):
        inside = mask & (place >= a) & (place < b)
        sides.append(Side(batch, torch.where(a < b, inside, mask)))
    return sides


def gradient(forward: Forward, params: Tree, side: Side) -> Tree:
    """The gradient of the mean loss over one side; can itself be differentiated."""

    def loss(at: Tree) -> Tensor:
        return mean(forward.losses(at, side.batch), side.mask)

    found: Tree = grad(loss)(dict(params))
    return found


def adapt(
    forward: Forward, params: Tree, side: Side, rates: Tree | float, steps: int, *, first: bool
) -> Tree:
    """``theta <- theta - alpha grad L_support(theta)``, some times.

    Args:
        forward: the task's losses.
        params: theta.
        side: the support part.
        rates: alpha: one number, or one for each parameter.
        steps: how many.
        first: whether derivatives of the gradient are left out (first-order MAML).

    Source: Finn, Abbeel and Levine 2017, equation 1 (arXiv:1703.03400).
    """
    for _ in range(steps):
        found = gradient(forward, params, side)
        if first:
            found = map_tree(torch.Tensor.detach, found)
        if isinstance(rates, float):
            params = map_tree(lambda p, g: p - rates * g, params, found)
        else:
            params = map_tree(lambda p, a, g: p - a * g, params, rates, found)
    return params


def after_adapting(inner_lr: float, inner_steps: int, support: float, *, first: bool) -> Objective:
    """The query loss of the parameters adapted to the support part (equation 2 there)."""

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        known, asked = deal(batch, mask, [support])
        params = adapt(forward, local.params, known, inner_lr, inner_steps, first=first)
        return mean(forward.losses(params, asked.batch), asked.mask)

    return objective
