"""A little is enough."""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

from torch import Tensor

from umbel.core.settings import NonNegative
from umbel.core.trees import Tree, map_tree
from umbel.simulations.attacks.attack import Attack, Scene, deviation, mean
from umbel.simulations.attacks.search import strongest


def alie(*, z: NonNegative | Literal["search"] | None = None) -> Attack:
    """Honest mean minus z standard deviations. Baruch et al. 2019, Algorithm 3 (arXiv:1902.06156).

    Args:
        z: deviations; ``None``: the paper's, as many as enough honest clients have themselves to
            be taken for the majority; ``search``: as many as move the server's rule the most.
    """

    def forge(scene: Scene) -> Tree:
        rows = scene.rows()
        centre, spread = mean(rows), deviation(rows)

        def moved(factor: float) -> dict[str, Tensor]:
            return map_tree(lambda m, s: m - factor * s, centre, spread)

        if z == "search":
            return scene.each(strongest(scene, moved))
        assert scene.honest is not None
        honest, hostile = len(scene.honest.clients), len(scene.hostile)
        return scene.each(moved(papers_z(honest + hostile, hostile) if z is None else z))

    return Attack(forge=forge, sees="honest")


def papers_z(n: int, f: int) -> float:
    """The largest z with which hostile clients still find the s supporters that they lack.

    Args:
        n: clients in the cohort.
        f: hostile ones.

    Source: Baruch et al. 2019, Algorithm 3, lines 1 and 2.
    """
    supporters = n // 2 + 1 - f
    share = (n - f - supporters) / (n - f)
    return max(0.0, NormalDist().inv_cdf(min(max(share, 1e-9), 1 - 1e-9)))
