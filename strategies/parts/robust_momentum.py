"""Momentum at the clients: what a robust rule sees is steadier than one round's delta."""

from __future__ import annotations

from umbel.core.trees import Tree, map_tree, zeros_like
from umbel.strategies.parts.rule import ClientRule, Delivered, Ended, Trees


def client_momentum(beta: float) -> ClientRule:
    """Each client sends ``m = beta m + (1 - beta) delta`` in place of its delta, and keeps m.

    With one local step of SGD it is the momentum of the gradient, as in the paper. Attacks such as
    ALIE hide in the noise of the honest deltas, and that shrinks.

    Args:
        beta: 0 is no momentum, and no state.

    Source: Karimireddy, He and Jaggi 2021, Algorithm 2 (arXiv:2012.10333).
    """
    if not beta:
        return ClientRule()

    def state(params: Tree) -> Trees:
        return {"m": zeros_like(params)}

    def end(ended: Ended) -> Delivered:
        m = map_tree(
            lambda m, p, a: beta * m + (1 - beta) * (p - a),
            ended.own["m"],
            ended.params,
            ended.anchor,
        )
        return Delivered(own={"m": m}, delta=m)

    return ClientRule(state=state, end=end)
