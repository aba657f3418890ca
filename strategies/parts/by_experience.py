"""A model with parts for each experience, of which each is trained in its own and then never again.

What a part's name says of when it is trained holds at the clients and at the server, whatever the
optimizers carry over: momentum moves nothing that is done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from umbel.core.trees import Tree
from umbel.strategies.parts.defence import Classes, Defence, Turn
from umbel.strategies.parts.rule import ClientRule, Local, Trees, model_part

STAGE = "stage"


def parted(
    model: Callable[[nn.Module, int], nn.Module], trained_in: Callable[[str], int]
) -> Defence:
    """The defence that is such a model.

    Args:
        model: (the task's module, experiences) -> the module with parts.
        trained_in: a parameter's name -> the experience that it is trained in, from 0.
    """

    def letters(params: Tree, classes: Classes) -> Trees:
        return {STAGE: {"number": torch.zeros(())}}

    def turn(letters: Trees, turn: Turn) -> Trees:
        return {STAGE: {"number": letters[STAGE]["number"] + 1}}

    def held(before: Tree, after: Tree, letters: Trees) -> dict[str, torch.Tensor]:
        now = letters[STAGE]["number"]
        return {n: torch.where(now == trained_in(n), p, before[n]) for n, p in after.items()}

    def rule(rule: ClientRule) -> ClientRule:
        def after(params: Tree, gradient: Tree, local: Local) -> Tree:
            if rule.after is not None:
                params = rule.after(params, gradient, local)
            return {**params, **held(local.params, model_part(params), local.shared)}

        return rule._replace(after=after)

    return Defence(letters, turn, rule, holds=held, model=model)
