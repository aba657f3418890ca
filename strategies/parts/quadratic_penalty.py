"""A penalty on moving what mattered: quadratic, around the models of earlier experiences."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.trees import Tree, map_tree, zeros_like
from umbel.strategies.parts.defence import IMPORTANCE, Classes
from umbel.strategies.parts.rule import ClientRule, Local, Trees, model_part

PULL = "pull"


def nothing_yet(params: Tree, classes: Classes) -> Trees:
    """The letters of the first experience: no penalty."""
    return {IMPORTANCE: zeros_like(params), PULL: zeros_like(params)}


def pulled(importance: Tree, params: Tree) -> Trees:
    """The letters of ``sum F (theta - params)^2`` for one importance F."""
    return {IMPORTANCE: importance, PULL: map_tree(torch.mul, importance, params)}


def penalised(rule: ClientRule, strength: float) -> ClientRule:
    """The rule with ``strength / 2 * sum_e F_e (theta - theta_e)^2``, less a constant.

    With ``A = sum F_e`` and ``B = sum F_e theta_e`` that is ``strength / 2 * (A theta^2 - 2 B
    theta)``: two trees, however many experiences there were.
    """

    def term(local: Local) -> Tensor:
        a, b = local.shared[IMPORTANCE], local.shared[PULL]
        parts = [(p * (a[n] * p - 2 * b[n])).sum() for n, p in model_part(local.params).items()]
        return 0.5 * strength * torch.stack(parts).sum()

    if rule.objective is None:
        return rule._replace(loss_terms=(*rule.loss_terms, term))
    own = rule.objective
    return rule._replace(
        objective=lambda forward, local, batch, mask: own(forward, local, batch, mask) + term(local)
    )
