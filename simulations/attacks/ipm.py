"""Inner product manipulation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from umbel.core.settings import NonNegative
from umbel.core.trees import Tree, map_tree
from umbel.simulations.attacks.attack import Attack, Scene, mean
from umbel.simulations.attacks.search import strongest


def ipm(*, epsilon: NonNegative | Literal["search"] = 0.5) -> Attack:
    """Minus epsilon times the honest mean. Xie et al. 2020, section 4 (arXiv:1903.03936).

    Args:
        epsilon: small ones slip into the rule's choice, large ones turn its sign; ``search``: the
            one that moves the server's rule the most.
    """

    def forge(scene: Scene) -> Tree:
        centre = mean(scene.rows())

        def moved(factor: float) -> dict[str, Tensor]:
            return map_tree(lambda m: -factor * m, centre)

        return scene.each(strongest(scene, moved) if epsilon == "search" else moved(epsilon))

    return Attack(forge=forge, sees="honest")
