"""Sign flip."""

from __future__ import annotations

from typing import Literal

from umbel.core.settings import Positive
from umbel.core.trees import Tree, map_tree
from umbel.simulations.attacks.attack import Attack, Scene, mean


def sign_flip(*, of: Literal["own", "honest-mean"] = "own", scale: Positive = 1.0) -> Attack:
    """The negative of an update. Allen-Zhu et al. 2021 (arXiv:2012.14368); Li et al. 2019.

    Args:
        of: the client's own, as Li et al. have it (arXiv:1811.03761), or the mean of the honest.
        scale: what it is multiplied by besides.
    """

    def forge(scene: Scene) -> Tree:
        if of == "honest-mean":
            return scene.each(map_tree(lambda t: -scale * t, mean(scene.rows())))
        assert scene.own is not None
        return {name: -scale * scene.own.delta[name].double() for name in scene.floating()}

    return Attack(forge=forge, sees="own" if of == "own" else "honest")
