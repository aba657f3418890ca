"""How the updates of a cohort become one: a monoid where the mathematics allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from umbel.core.payloads import Updates
from umbel.core.trees import Tree, map_tree
from umbel.strategies.parts.rule import NONE, Trees

SMALL = 1024
"""Up to so many values, the rows of a tensor are summed in one operation and not in a loop."""


class Combined(NamedTuple):
    """What a server step is given.

    Args:
        delta: name -> (*shape), float64.
        weight: the sum of the weights.
        clients: how many updates went in.
        extra: what clients sent besides their deltas, combined; float64.
        population: how many clients the federation has.
        share: the sum of the weights, as a share of that over all clients of the federation.
    """

    delta: Tree
    weight: float
    clients: int
    extra: Trees = NONE
    population: int = 0
    share: float = 1.0


class Combiner(NamedTuple):
    """Folds updates into one without keeping them.

    Args:
        zero: the global tensors -> an empty accumulator.
        add: (accumulator, updates) -> accumulator; may reuse the memory of the first.
        merge: (accumulator, accumulator) -> accumulator, for partial sums of workers; may reuse
            the memory of the first. ``None`` where the whole cohort is needed in one place, as by
            robust rules: workers then hand every update back.
        finish: accumulator -> :class:`Combined`.
        fewest: updates without which there is no result; a round with fewer leaves the model.
    """

    zero: Callable[[Tree], Any]
    add: Callable[[Any, Updates], Any]
    merge: Callable[[Any, Any], Any] | None
    finish: Callable[[Any], Combined]
    fewest: int = 1


class Sums(NamedTuple):
    """A weighted sum under way: name -> (*shape) float64, the sum of the weights, and the count."""

    delta: dict[str, Tensor]
    weight: float
    clients: int


def weighted_mean() -> Combiner:
    """``sum_k w_k delta_k / sum_k w_k``, summed in float64, in the order that updates are added.

    Float64 and a fixed order make the result independent of how clients were grouped into stacks.

    Source: McMahan et al. 2017, FedAvg, Algorithm 1 (arXiv:1602.05629), on deltas.
    """

    def zero(model: Tree) -> Sums:
        return Sums(map_tree(lambda t: torch.zeros_like(t, dtype=torch.float64), model), 0.0, 0)

    def add(sums: Sums, updates: Updates) -> Sums:
        weights = updates.weights.tolist()
        for name, total in sums.delta.items():
            stack = updates.delta[name].to(total.device)
            if total.numel() <= SMALL and total.device.type == "cpu":
                total.copy_(_running(total, stack, updates.weights))
            else:
                for row, weight in zip(stack, weights, strict=True):
                    total.add_(row.double(), alpha=weight)
        return Sums(sums.delta, sum(weights, sums.weight), sums.clients + len(weights))

    def merge(left: Sums, right: Sums) -> Sums:
        for name, total in left.delta.items():
            total.add_(right.delta[name])
        return Sums(left.delta, left.weight + right.weight, left.clients + right.clients)

    def finish(sums: Sums) -> Combined:
        delta = map_tree(lambda t: t / sums.weight, sums.delta)
        return Combined(delta, sums.weight, sums.clients)

    return Combiner(zero, add, merge, finish)


def _running(total: Tensor, stack: Tensor, weights: Tensor) -> Tensor:
    """``total`` (*shape) plus the rows of ``stack`` (n, *shape) by weight, one after another."""
    rows = stack.detach().reshape(len(stack), -1).double() * weights[:, None]
    rows[0] += total.flatten()
    # NumPy adds row to row, but a single column, which is contiguous, in pairs; Torch does always.
    found = rows.cumsum(0)[-1] if rows.shape[1] == 1 else np.add.reduce(rows.numpy(), axis=0)
    return torch.as_tensor(found).view_as(total)
