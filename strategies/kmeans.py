"""k-means: each centroid moves to the mean of the examples that are nearest to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jvp

from umbel.core.settings import NonNegative
from umbel.core.trees import Tree, add_cast, map_tree
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
from umbel.strategies.parts.rule import Forward, joined, mean, model_part


def kmeans(*, restart: NonNegative = 0.01) -> Strategy:
    """Lloyd's k-means over all clients, by sums and counts. Bottou and Bengio 1995, section 3 (NIPS
    7): a step of Newton's method.

    A client sends ``sum (x - c)`` over the examples nearest to each centroid c, and their number,
    both divided by how many examples it has; the server divides the weighted mean of the sums by
    that of the numbers. So it is right under secure aggregation, with any split into clients, and
    for any optimizer, rate and number of steps. Batches count against the round's first centroids;
    ``weights = "uniform"`` weighs clients alike and not examples.

    For ``[task] kind = "kmeans"``, or another whose second derivative is the same for all numbers
    of a row: that is the count.

    Args:
        restart: a centroid without examples goes to that of the most, moved by this share of their
            distance; 0: it stays.
    """

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        return {**anchor, **{f"n/{name}": t for name, t in counters(anchor).items()}}

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        size = len(next(iter(batch.values()))) if mask is None else mask.sum()
        params = model_part(local.params)

        def total(moved: Tree) -> Tensor:
            return mean(forward.losses(moved, batch), mask) * size

        held = dict(local.anchor)
        ones = map_tree(torch.ones_like, held)
        sums, seconds = jvp(grad(total), (held,), (ones,))[:2]
        # Linear in what is trained, so that its gradient is just these sums.
        terms = [(params[n] * s.detach()).sum() for n, s in sums.items()]
        counted = joined(local.params, "n")
        terms += [(counted[n] * first(s).detach()).sum() for n, s in seconds.items()]
        return torch.stack(terms).sum()

    def after(stepped: Tree, gradient: Tree, local: Local) -> Tree:
        return map_tree(lambda p, g: p - g, local.params, gradient)

    def end(ended: Ended) -> Delivered:
        counted = map_tree(lambda t: -t / ended.examples, ended.own["n"])
        moved = map_tree(lambda p, a: (p - a) / ended.examples, ended.params, ended.anchor)
        return Delivered(uploads={"n": counted}, delta=moved)

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        return {n: step(p, mean.delta[n], mean.extra["n"][n]) for n, p in params.items()}, state

    def step(centroids: Tensor, moved: Tensor, counted: Tensor) -> Tensor:
        shape = [-1, *[1] * (centroids.dim() - 1)]
        some = (counted > 0).view(shape)
        to = torch.where(some, moved / counted.clamp(min=1e-12).view(shape), 0.0)
        found = add_cast(centroids, to)
        if not restart or not bool(some.any()):
            return found
        fullest = found[counted.argmax()]
        return torch.where(some, found, fullest + restart * (found - fullest))

    rule = ClientRule(begin=begin, end=end, objective=objective, after=after, joint=("n",))
    return Strategy(
        lambda params: {},
        rule,
        weighted_mean(),
        server,
        uploads=lambda params: {"n": counters(params)},
    )


def counters(params: Tree) -> dict[str, Tensor]:
    """A zero for each row of each tensor."""
    return map_tree(lambda p: p.new_zeros(p.shape[0]), params)


def first(rows: Tensor) -> Tensor:
    """The first number of each row, (rows, …) -> (rows,)."""
    return rows.flatten(1)[:, 0] if rows.dim() > 1 else rows
