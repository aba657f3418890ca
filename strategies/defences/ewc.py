"""EWC: parameters that earlier experiences depend on are held near where those left them."""

from __future__ import annotations

from umbel.core.settings import Count, NonNegative
from umbel.core.trees import map_tree
from umbel.strategies.parts.defence import IMPORTANCE, Defence, Measure, Turn
from umbel.strategies.parts.quadratic_penalty import PULL, nothing_yet, penalised, pulled
from umbel.strategies.parts.rule import Trees


def ewc(*, strength: NonNegative = 100.0, examples: Count = 200) -> Defence:
    """EWC. Kirkpatrick et al. 2017, equation 3 (arXiv:1612.00796); strength = 0 is naive.

    ``L(theta) + strength / 2 * sum_e F_e (theta - theta_e)^2``, F_e the diagonal of the empirical
    Fisher information: the mean square of the gradient of one example's loss, at its true label.
    Clients measure it when an experience ends, and the server averages it; penalties of several
    experiences add up (Huszar 2018, equation 4, arXiv:1712.03847).

    Args:
        strength: lambda.
        examples: how many a client measures with.
    """

    def turn(letters: Trees, turn: Turn) -> Trees:
        new = pulled(turn.importance, turn.params)
        return {
            letter: map_tree(lambda a, b: a + b, letters[letter], new[letter])
            for letter in (IMPORTANCE, PULL)
        }

    return Defence(
        nothing_yet, turn, lambda rule: penalised(rule, strength), Measure(lambda g: g**2, examples)
    )
