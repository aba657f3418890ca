"""Min-max."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from umbel.core.trees import Tree, map_tree, norm
from umbel.simulations.attacks.attack import Attack, Scene, deviation, mean


def min_max(*, direction: Literal["std", "unit", "sign"] = "std") -> Attack:
    """Off the honest mean, no farther from anyone than the honest. Shejwalkar and Houmansadr 2021.

    Equation 8 (NDSS 2021), solved in closed form where the paper bisects.

    Args:
        direction: minus the standard deviations, the unit vector of the mean, or its signs.
    """

    def forge(scene: Scene) -> Tree:
        rows = scene.rows()
        centre = mean(rows)
        towards = {
            "std": lambda: map_tree(torch.neg, deviation(rows)),
            "unit": lambda: map_tree(lambda m: -m / norm(centre).clamp(min=1e-300), centre),
            "sign": lambda: map_tree(lambda m: -m.sign(), centre),
        }[direction]()
        factor = farthest(rows, centre, towards)
        return scene.each(map_tree(lambda m, p: m + factor * p, centre, towards))

    return Attack(forge=forge, sees="honest")


def farthest(rows: Tree, centre: Tree, towards: Tree) -> float:
    """The largest g for which ``centre + g towards`` is within the honest diameter of every row."""
    apart = _matrix({n: centre[n] - rows[n] for n in rows})
    step = _matrix({n: t[None] for n, t in towards.items()})[0]
    size = float(step @ step)
    if size == 0:
        return 0.0
    diameter = float(torch.cdist(apart, apart, compute_mode="donot_use_mm_for_euclid_dist").max())
    along, far = apart @ step / size, apart.square().sum(1)
    # |a_i + g p|^2 = D^2 is a quadratic in g with one root that is not negative.
    roots = -along + (along.square() + (diameter**2 - far) / size).clamp(min=0.0).sqrt()
    return max(0.0, float(roots.min()))


def _matrix(rows: Tree) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in rows.values()], dim=1)
