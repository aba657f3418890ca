"""A client rule that adds something up over its steps, beside all else that it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umbel.core.trees import Tree
from umbel.strategies.parts.rule import (
    ClientRule,
    Forward,
    GradTransform,
    Local,
    LossTerm,
    Trees,
    mean,
    model_part,
)


def tallied(rule: ClientRule, letter: str, of: Callable[[Tree, Tree, Local], Tree]) -> ClientRule:
    """The rule, and under ``letter`` in ``Ended.own`` the sum of ``of`` over the client's steps.

    Args:
        rule: its parts never see the sum.
        letter: not one of the rule's own.
        of: (the gradient that the optimizer was given, how the step moved the parameters,
            ``Local`` before it) -> what is added, of the parameters' names and shapes.
    """
    prefix = f"{letter}/"

    def theirs(tree: Tree) -> dict[str, Tensor]:
        return {n: t for n, t in tree.items() if not n.startswith(prefix)}

    def seen(local: Local) -> Local:
        return local._replace(params=theirs(local.params))

    def blind_term(term: LossTerm) -> LossTerm:
        return lambda local: term(seen(local))

    def blind_transform(transform: GradTransform) -> GradTransform:
        return lambda gradient, local: {**gradient, **transform(theirs(gradient), seen(local))}

    # Always an objective: kernels without one train nothing but what the model is called with.
    def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        if rule.objective is not None:
            return rule.objective(forward, seen(local), batch, mask)
        return rule.loss(mean(forward.losses(local.params, batch), mask), seen(local))

    def begin(anchor: Tree, shared: Trees, own: Trees) -> Tree:
        params = anchor if rule.begin is None else rule.begin(anchor, shared, own)
        return {**params, **{prefix + n: torch.zeros_like(p) for n, p in anchor.items()}}

    def after(params: Tree, gradient: Tree, local: Local) -> Tree:
        settled = theirs(params)
        if rule.after is not None:
            settled = dict(rule.after(settled, theirs(gradient), seen(local)))
        before = model_part(local.params)
        moved = {n: settled[n] - p for n, p in before.items()}
        more = of({n: gradient[n] for n in before}, moved, local)
        return {**settled, **{prefix + n: local.params[prefix + n] + more[n] for n in before}}

    return rule._replace(
        loss_terms=tuple(map(blind_term, rule.loss_terms)),
        grad_transforms=tuple(map(blind_transform, rule.grad_transforms)),
        objective=objective,
        begin=begin,
        after=after,
        joint=(*rule.joint, letter),
    )
