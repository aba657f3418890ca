"""LwF: on new examples, old classes keep the odds that the earlier model gave them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.defence import Classes, Defence, Turn, adding
from umbel.strategies.parts.rule import Forward, Local, Trees, mean

NEVER = -1e4


def lwf(*, strength: NonNegative = 1.0, temperature: Positive = 2.0) -> Defence:
    """LwF. Li and Hoiem 2016, equations 1 to 4 (arXiv:1606.09282); strength = 0 is naive.

    ``L + strength T^2 sum_g KL(p_g || q_g)`` over the groups of classes that were met before: p is
    what the last experience's model makes of the example, q what the client's does, both softened
    by T. One group under a single or growing head; one an experience under several. T^2 keeps the
    gradient's size (Hinton et al. 2015, section 2).

    Args:
        strength: lambda.
        temperature: T.
    """

    def letters(params: Tree, classes: Classes) -> Trees:
        return _letters(params, classes._replace(seen=torch.zeros_like(classes.seen)))

    def turn(letters: Trees, turn: Turn) -> Trees:
        return _letters(turn.params, turn.classes)

    def distil(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        mine = forward.outputs(local.params, batch) / temperature
        with torch.no_grad():
            old = forward.outputs(local.shared["teacher"], batch) / temperature
        total = torch.zeros_like(mine[:, 0])
        # Of a group without an old class both sides are even, and the divergence is 0.
        for counts in local.shared["heads"].values():
            p = F.log_softmax(torch.where(counts > 0, old, NEVER), 1)
            q = F.log_softmax(torch.where(counts > 0, mine, NEVER), 1)
            total = total + (p.exp() * (p - q)).sum(1)
        return strength * temperature**2 * mean(total, mask)

    def rule(rule: ClientRule) -> ClientRule:
        return adding(rule, distil)

    return Defence(letters, turn, rule, outputs=True)


def _letters(params: Tree, classes: Classes) -> Trees:
    old = classes.groups & classes.seen
    return {
        "teacher": dict(params),
        "heads": {f"g{i}": row.to(torch.float32) for i, row in enumerate(old)},
    }
