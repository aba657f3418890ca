"""SI: parameters whose movement lowered the loss are held where they ended."""

from __future__ import annotations

from umbel.core.settings import NonNegative, Positive
from umbel.core.trees import Tree, add_cast, map_tree, zeros_like
from umbel.strategies.parts import ClientRule, Combined, Delivered, Ended
from umbel.strategies.parts.defence import IMPORTANCE, Classes, Defence, Turn
from umbel.strategies.parts.quadratic_penalty import PULL, nothing_yet, penalised, pulled
from umbel.strategies.parts.rule import Local, Trees
from umbel.strategies.parts.tally import tallied

OMEGA, ORIGIN = "omega", "origin"


def si(*, strength: NonNegative = 1.0, damping: Positive = 0.1) -> Defence:
    """SI. Zenke et al. 2017, equations 3 to 5 (arXiv:1703.04200); strength = 0 is naive.

    Each client adds up ``omega = -sum g dtheta`` over its steps, the share of each parameter in how
    far the loss fell, and the server their mean over rounds. When the experience ends,
    ``omega / ((theta_end - theta_begin)^2 + damping)`` adds to the importance, around the
    parameters that the last experience left; what raised the loss counts for nothing. g is the
    gradient that the optimizer was given, less the penalty's: exact without ``max_grad_norm``.

    Args:
        strength: twice the paper's c.
        damping: xi, in squared parameter units.
    """

    def letters(params: Tree, classes: Classes) -> Trees:
        nothing = nothing_yet(params, classes)
        return {**nothing, OMEGA: zeros_like(params), ORIGIN: dict(params)}

    def turn(letters: Trees, turn: Turn) -> Trees:
        found = map_tree(
            lambda a, omega, began, ended: (
                a + omega.clamp(min=0) / ((ended - began).square() + damping)
            ),
            letters[IMPORTANCE],
            letters[OMEGA],
            letters[ORIGIN],
            turn.params,
        )
        fresh = {OMEGA: zeros_like(found), ORIGIN: dict(turn.params)}
        return {**pulled(found, turn.params), **fresh}

    def fallen(gradient: Tree, moved: Tree, local: Local) -> Tree:
        a, b = local.shared[IMPORTANCE], local.shared[PULL]
        own = {n: g - strength * (a[n] * local.params[n] - b[n]) for n, g in gradient.items()}
        return map_tree(lambda g, step: -g * step, own, moved)

    def rule(rule: ClientRule) -> ClientRule:
        def end(ended: Ended) -> Delivered:
            theirs = Delivered() if rule.end is None else rule.end(ended)
            return theirs._replace(uploads={**theirs.uploads, OMEGA: ended.own[OMEGA]})

        return tallied(penalised(rule, strength), OMEGA, fallen)._replace(end=end)

    def step(letters: Trees, mean: Combined) -> Trees:
        return {**letters, OMEGA: map_tree(add_cast, letters[OMEGA], mean.extra[OMEGA])}

    return Defence(
        letters,
        turn,
        rule,
        at_server=frozenset({OMEGA, ORIGIN}),
        uploads=lambda params: {OMEGA: zeros_like(params)},
        step=step,
    )
