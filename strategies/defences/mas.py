"""MAS: parameters that the model's outputs are sensitive to are held where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from umbel.core.settings import Count, NonNegative
from umbel.core.trees import Tree, map_tree
from umbel.strategies.parts.defence import IMPORTANCE, Defence, Measure, Turn
from umbel.strategies.parts.quadratic_penalty import nothing_yet, penalised, pulled
from umbel.strategies.parts.rule import Forward, Local, Trees, mean


def mas(*, strength: NonNegative = 1.0, examples: Count = 200) -> Defence:
    """MAS. Aljundi et al. 2018, equations 2 to 4 (arXiv:1711.09601); strength = 0 is naive.

    The importance is the mean of ``|d ||f(x)||^2 / d theta|``, of the logits f; those of several
    experiences add up, around the parameters that the last one left. It needs no labels.

    Args:
        strength: twice the paper's lambda.
        examples: how many a client measures with.
    """

    def squared(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
        return mean(forward.outputs(local.params, batch).square().flatten(1).sum(1), mask)

    def turn(letters: Trees, turn: Turn) -> Trees:
        total = map_tree(lambda a, b: a + b, letters[IMPORTANCE], turn.importance)
        return pulled(total, turn.params)

    return Defence(
        nothing_yet,
        turn,
        lambda rule: penalised(rule, strength),
        Measure(torch.abs, examples, squared),
        outputs=True,
    )
