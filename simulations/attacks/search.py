"""How far an omniscient adversary goes: as far as moves the server's rule the most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from umbel.core.payloads import Updates
from umbel.core.trees import Tree, norm, subtract
from umbel.simulations.attacks.attack import Scene, mean

EVALUATIONS = 12


def strongest(scene: Scene, forged: Callable[[float], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The forgery, by its factor, that moves the rule's result farthest from the honest mean.

    The factor starts at 0 and grows by steps that double while that helps; then it is refined. The
    adversary knows the rule and every honest update of the round.

    Args:
        scene: of the round.
        forged: factor, 0 or more -> name -> (*shape), what every hostile client sends.

    Source: Shejwalkar and Houmansadr 2021, section IV (NDSS), as the benchmark of ByzFL does it.
    """
    aim = mean(scene.rows())

    def damage(factor: float) -> float:
        sent = joined(scene, scene.each(forged(factor)))
        made = scene.rule(sent)
        return float(norm(subtract({n: made[n].double() for n in aim}, aim)))

    best, most, step, growing = 0.0, damage(0.0), 1.0, True
    for _ in range(EVALUATIONS - 1):
        found = damage(trial := max(0.0, best + step))
        if found > most:
            best, most = trial, found
            step = 2 * step if growing else step
        else:
            step, growing = -step / 2 if not growing or step > 0 else -step, False
    return forged(best)


def joined(scene: Scene, forged: Tree) -> Updates:
    """What the server would be sent: the honest updates, and ``forged`` ones of mean weight."""
    honest = scene.honest
    assert honest is not None
    count = len(scene.hostile)
    delta = {}
    for name, stack in honest.delta.items():
        more = forged[name].to(stack.dtype) if name in forged else torch.zeros_like(stack[:1])
        delta[name] = torch.cat([stack, more.expand(count, *stack.shape[1:])])
    weights = torch.cat([honest.weights, honest.weights.mean().expand(count)])
    return Updates(honest.round, [*honest.clients, *scene.hostile], delta, weights)
