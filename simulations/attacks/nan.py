"""Not a number."""

from __future__ import annotations

import torch

from umbel.core.trees import Tree
from umbel.simulations.attacks.attack import Attack, Scene


def nan() -> Attack:
    """NaN in every value: a broken client, or one that would break the model. The gate names it."""

    def forge(scene: Scene) -> Tree:
        shapes = {name: scene.template[name].shape for name in scene.floating()}
        return scene.each({n: torch.full(s, float("nan")) for n, s in shapes.items()})

    return Attack(forge=forge)
