"""The sum of the features of each class, as clients find it in one pass over their examples."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from umbel.core.trees import Tree
from umbel.strategies.parts.combine import Combined, weighted_mean
from umbel.strategies.parts.rule import (
    ClientRule,
    Delivered,
    Ended,
    Forward,
    Local,
    Trees,
    joined,
)
from umbel.strategies.parts.strategy import ServerState, Strategy

PROTOTYPES = "prototypes"


def class_sums(classes: int, width: int) -> Strategy:
    """A strategy that moves nothing, and whose state after a round is sums and counts by class.

    ``sums`` (classes, width) of features of length 1, and ``counts`` (classes,), both as a mean
    over clients. What is sent is weighed, gated, masked and summed as an update is. Clients must
    pass over their examples once; with uniform weights sums over counts are means over all
    examples.

    Source: Rebuffi et al. 2017, iCaRL, equation 2 (arXiv:1611.07725); sums and counts, so that a
    server need not see a client's means.
    """

    def zero(params: Tree) -> Trees:
        like = next(iter(params.values()))
        return {
            PROTOTYPES: {"sums": like.new_zeros(classes, width), "counts": like.new_zeros(classes)}
        }

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        return {**anchor, **{f"{PROTOTYPES}/{n}": t for n, t in zero(anchor)[PROTOTYPES].items()}}

    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        features = F.normalize(forward.features(local.params, batch).detach().flatten(1), dim=1)
        which = F.one_hot(batch["y"], classes).to(features.dtype)
        if mask is not None:
            which = which * mask[:, None]
        mine = joined(local.params, PROTOTYPES)
        # The gradient is what is to be added.
        return (mine["sums"] * (which.T @ features)).sum() + (mine["counts"] * which.sum(0)).sum()

    def after(params: Tree, gradient: Tree, local: Local) -> Tree:
        return {n: p + gradient[n] if "/" in n else p for n, p in local.params.items()}

    def end(ended: Ended) -> Delivered:
        return Delivered(uploads={PROTOTYPES: ended.own[PROTOTYPES]})

    def server(params: Tree, state: ServerState, mean: Combined) -> tuple[Tree, ServerState]:
        return params, {PROTOTYPES: mean.extra[PROTOTYPES]}

    rule = ClientRule(begin=begin, end=end, after=after, objective=objective, joint=(PROTOTYPES,))
    return Strategy(lambda params: {}, rule, weighted_mean(), server, uploads=zero)
