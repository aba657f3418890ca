"""A-GEM: no step goes against the gradient on earlier examples."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.func import grad

from umbel.core.settings import Count, Natural
from umbel.core.trees import Tree, map_tree
from umbel.datasets.buffer import Buffer
from umbel.strategies.parts import ClientRule
from umbel.strategies.parts.defence import Defence, mean_of, sides
from umbel.strategies.parts.multi import dot, towards
from umbel.strategies.parts.rule import Forward, Local, model_part


def agem(
    *,
    per_class: Natural | None = None,
    examples: Natural | None = None,
    bytes: Count | None = None,
    choice: Literal["balanced", "reservoir", "herding"] = "balanced",
    repeat: bool = True,
) -> Defence:
    """A-GEM. Chaudhry et al. 2019, equation 11 (arXiv:1812.00420); without a violation, plain SGD.

    With g the gradient on the new examples of a batch and r that on the old ones, the step is along
    g, or, where ``g.r < 0``, along ``g - (g.r / r.r) r``. The old ones are those of the same batch,
    not a batch of their own.

    Args:
        per_class: as for replay.
        examples: as for replay.
        bytes: as for replay.
        choice: as for replay.
        repeat: as for replay.
    """

    def rule(rule: ClientRule) -> ClientRule:
        def objective(forward: Forward, local: Local, batch: Tree, mask: Tensor | None) -> Tensor:
            params = map_tree(torch.Tensor.detach, model_part(local.params))
            g, r = (_gradient(forward, params, batch, chosen) for chosen in sides(batch, mask))
            return towards(local.params, projected(g, r)) + rule.loss(_nought(local.params), local)

        return rule._replace(objective=objective)

    kept = Buffer.bounded(per_class, examples, bytes, choice, repeat)
    return Defence(rule=rule, buffer=kept, tells_old=True, replaces=True)


def projected(g: Tree, r: Tree) -> Tree:
    """g, without what goes against r; a zero r leaves it as it is."""
    against = dot(g, r).clamp(max=0) / dot(r, r).clamp(min=torch.finfo(torch.float32).tiny)
    return map_tree(lambda a, b: a - against * b, g, r)


def _gradient(forward: Forward, params: Tree, batch: Tree, chosen: Tensor) -> Tree:
    found: Tree = grad(lambda at: mean_of(forward.losses(at, batch), chosen))(dict(params))
    return map_tree(torch.Tensor.detach, found)


def _nought(params: Tree) -> Tensor:
    return next(iter(params.values())).new_zeros(())
